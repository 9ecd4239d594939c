"""What can be chosen of what becomes of rewards before they are compared. Plain settings, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """What becomes of an episode's reward before it is compared. Metrics and selection see it as it came."""

    outcome: Literal["reward", "indicator", "majority", "agreement", "certainty"] = setting(
        "reward",
        "the reward itself; indicator: `right` where it is above `threshold`, else `wrong` (RAFT with fractional "
        "rewards); majority: 1 for the answer that most of the group gave (TTRL); agreement: share of the group that "
        "gave the same answer (EMPO); certainty: minus the mean entropy of the tokens (RENT)",
    )
    threshold: float = setting(0.0, "indicator, length, pass_k: rewards above it count as right")
    right: float = setting(1.0, "indicator: what a right answer counts (W-REINFORCE: 0.1)")
    wrong: float = setting(0.0, "indicator: what a wrong one counts (W-REINFORCE: -1)")
    answer_note: str = setting(
        "", "majority, agreement: name of the task's note that is the same number for the same answer"
    )
    truncated_wrong: bool = setting(False, "answers ended by a limit of tokens or turns count as `wrong` (DLER)")
    length: Literal[
        "none", "target", "target_max", "range", "solve_rate", "within", "shortest_right", "sigmoid", "z_score"
    ] = setting(
        "none",
        "how the length L of an answer changes its reward, w being length_weight: target: - w |target - L|, "
        "target_max: times clip(w (target - L) + 0.5, 0, 1) (L1); range: + w (0.5 - the place of L between the "
        "group's shortest and longest), for wrong answers at most 0 (Kimi k1.5); solve_rate: - w L times the group's "
        "share of right answers, at least 1 / n (ALP); within: + w for right answers up to the target (LASER); "
        "shortest_right: - w |L - that of the group's shortest right answer, or the mean where there is none| "
        "(ShorterBetter); sigmoid: right answers times 1 - w sigmoid(z), z_score: times exp(-w z), with z the length "
        "standardised among the group's right answers (Arora and Zanette; GRPO-LEAD)",
    )
    length_weight: float = setting(0.001, "length: w", above=0)
    length_target: int = setting(0, "length: the target", unit="tokens", min=0)
    length_target_note: str = setting("", "length: name of the task's note that holds the target, in tokens")
    unlikely: float = setting(
        0.0,
        "b: reward times 1 - b (n - rank) / n, rank 1 being the group's likeliest answer under mu; 0 is off",
        min=0,
        max=1,
    )
    risk: float = setting(
        0.0, "b: the reward becomes exp(b R) / (b times the group's mean of exp(b R)) (RS-GRPO); 0 is off", min=0
    )
    pass_k: int = setting(
        0, "k: the reward becomes what the answer adds to the best of k of the group (pass_form); 0 is off",
        unit="trajectories", min=0,
    )  # fmt: skip
    pass_form: Literal["advantage", "marginal"] = setting(
        "advantage",
        "pass_k: advantage: that of right and wrong answers in closed form (Pass@k training); marginal: the mean over "
        "the sets of k with the answer of how much the largest reward exceeds that of the others (PKPO)",
    )
    overlong_limit: int = setting(
        0, "policy tokens of the longest answer (DAPO: 20480); 0 is off", unit="tokens", min=0
    )
    overlong_buffer: int = setting(
        4096, "tokens before the limit over which the penalty grows from 0 to its full size", unit="tokens", min=1
    )
    bonus: float = setting(0.0, "weight of a number that the task notes, added to the reward (SPEAR: tool calls)")
    bonus_note: str = setting("", "name of that note")
    overlong_penalty: float = setting(1.0, "subtracted from the reward of an answer at the limit or above", min=0)
