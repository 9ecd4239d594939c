"""Settings of the feedback from finished groups to what is asked next (docs/howto/sampler.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class SamplerSettings:
    """Which problem is asked next, how many samples it gets, and from where its episodes start."""

    choose: Literal["order", "band", "thompson", "ucb", "curriculum"] = setting(
        "order",
        "how the next problem is chosen: order: the prompt order alone; of `candidates` problems, band: one that is "
        "neither too hard nor too easy; thompson: the one worth most under a draw of its success; curriculum: the one "
        "nearest to a target that moves; ucb: a source of the data by its upper confidence bound",
    )
    candidates: int = setting(
        8, "problems of the prompt order that are offered for each group, of which one is asked", unit="problems",
        min=2, max=100_000,
    )  # fmt: skip
    success: float = setting(0.5, "an episode whose reward is above this counts as a success", unit="reward")
    low: float = setting(
        0.2, "success from which a problem is in the band: hard enough to teach, and not hopeless", unit="share",
        min=0, below=1,
    )  # fmt: skip
    high: float = setting(0.8, "success up to which a problem is in the band", unit="share", above=0, max=1)
    refuse_outside: bool = setting(
        False,
        "refuse a finished group whose own success lies outside the band, and generate another one instead: the "
        "batch has as many groups as ever, all of them in the band",
    )
    half_life: float = setting(
        0.0,
        "versions of the weights after which what is known of a problem counts half; 0: it counts for ever",
        unit="versions",
        min=0,
    )
    value: Literal["variance", "vade"] = setting(
        "variance", "what a success p is worth to thompson: variance p (1 - p), or vade p (1 - p)^2"
    )
    source_field: str = setting(
        "", "ucb: field of the rows (of `Problem.data` where the task reads no rows) that names a problem's source"
    )
    ucb_window: int = setting(
        32, "ucb: newest groups of a source that its mean advantage is taken over", unit="groups", min=1, max=100_000
    )
    ucb_temperature: float = setting(
        0.1, "ucb: of the draw among the sources; 0 takes the one with the highest bound", min=0
    )
    target_begin: float = setting(0.8, "curriculum: success aimed at first", unit="share", min=0, max=1)
    target_end: float = setting(0.4, "curriculum: success aimed at in the end", unit="share", min=0, max=1)
    target_groups: int = setting(1000, "curriculum: groups over which the target moves", unit="groups", min=1)
    samples: Literal["fixed", "adaptive", "gvm"] = setting(
        "fixed",
        "samples of a group: fixed: batch.group_size; adaptive: fewer for problems that succeed more often than "
        "`adaptive_above`; gvm: as the variance of the gradient asks, batch.group_size in the mean",
    )
    adaptive_above: float = setting(
        0.6, "success above which a problem gets fewer samples (adaptive)", unit="share", above=0, below=1
    )
    min_samples: int = setting(
        2, "fewest samples of a group (adaptive, gvm)", unit="trajectories", min=1, max=1_000_000
    )
    max_samples: int = setting(
        0, "most samples of a group (gvm); 0: twice batch.group_size", unit="trajectories", min=0, max=1_000_000
    )
    turns: Literal["fixed", "adaptive"] = setting(
        "fixed",
        "turns that an episode may have: fixed: generator.max_turns; adaptive: those of the problem's longest success "
        "so far, times `turns_slack`",
    )
    turns_slack: float = setting(1.5, "room above the longest success (turns=adaptive)", unit="times", min=1)
    start: Literal["none", "field", "success", "failure"] = setting(
        "none",
        "what an answer may begin with, as context without loss: none; the beginning of a text in the data "
        "(`start_field`); of a stored success of the problem; a stored failure up to its error",
    )
    start_field: str = setting("", "field of the rows (or of `Problem.data`) with the text that answers begin with")
    start_place: Literal["answer", "prompt"] = setting(
        "answer",
        "where the beginning of the text stands (start=field): the answer goes on with it; or in the prompt, behind "
        "`start_instruction`, and the answer begins anew",
    )
    start_instruction: str = setting(
        "Here is the beginning of a right solution. Build on it:",
        "what stands before the text in the prompt (start_place=prompt)",
    )
    start_share: float = setting(
        1.0, "share of the groups that may have a start which get one", unit="share of groups", above=0, max=1
    )
    start_success: float = setting(
        1.0, "only problems whose success without a start is at most this get one; 0: those never solved",
        unit="share", min=0, max=1,
    )  # fmt: skip
    start_attempts: int = setting(
        0, "only problems that were tried so often without a start", unit="trajectories", min=0
    )
    start_min: float = setting(0.2, "least share of the text or answer that a start has", unit="share", min=0, max=1)
    start_max: float = setting(
        0.8, "largest share of it; each group draws between the two", unit="share", min=0, below=1
    )
