"""Settings of how the answers of a group hang together: forks of one another, a greedy one beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class RolloutSettings:
    """The rollout plan of training groups."""

    roots: int = setting(
        0,
        "answers of a group that begin with the prompt; each of the others goes on from within an earlier one when "
        "that is finished, whose tokens before the fork it takes over without loss; 0: all begin with the prompt",
        unit="trajectories",
        min=0,
        max=1_000_000,
    )
    shape: Literal["chain", "tree"] = setting(
        "chain", "forks go on from roots alone (chain), or `children` of them from every answer in turn (tree)"
    )
    children: int = setting(2, "tree: forks of each answer", unit="trajectories", min=1, max=1_000_000)
    fork: Literal["uncertain_turn", "improbable_token", "even"] = setting(
        "uncertain_turn",
        "where an answer is forked: at the begin of the turns behind the first whose first tokens were least likely "
        "(ARPO's entropy, as far as it is known of the sampled tokens); at tokens of a probability below `below`, "
        "spread evenly among them (SPO); at tokens spread evenly",
    )
    first_tokens: int = setting(8, "uncertain_turn: tokens of a turn that are looked at", unit="tokens", min=1)
    below: float = setting(0.9, "improbable_token: probability below which a token may be forked at", above=0, max=1)
    per_cut: int = setting(
        1, "improbable_token, even: forks that go on from the same place", unit="trajectories", min=1, max=1_000_000
    )
    greedy: bool = setting(
        False,
        "the first answer of each group is sampled greedily and not trained: a baseline (ReMax, recipe remax)",
    )
    window: int = setting(
        0,
        "an episode that has sampled so many tokens is cut there and goes on in a later permit; each piece is trained "
        "by itself, with the critic's value at the cut in place of what is to come (T-PPO, recipe t_ppo); 0: episodes "
        "are trained whole",
        unit="tokens",
        min=0,
        max=1_000_000_000,
    )


def parent_of(sample: int, plan: RolloutSettings) -> tuple[int, int] | None:
    """(sample that this one forks from, which of its forks it is); None: it begins with the prompt."""
    if not plan.roots or sample < plan.roots:
        return None
    number = sample - plan.roots
    if plan.shape == "tree":
        return number // plan.children, number % plan.children
    return number % plan.roots, number // plan.roots


def forks_of(parent: int, samples: int, plan: RolloutSettings) -> int:
    """How many forks go on from sample `parent` of a group of so many samples."""
    if plan.shape == "tree":
        return max(0, min(plan.children, samples - plan.roots - parent * plan.children))
    return len(range(plan.roots + parent, samples, plan.roots)) if parent < plan.roots else 0
