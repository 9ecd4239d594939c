"""Settings of the check that generators do what they report (docs/explanations/verification.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class VerifySettings:
    """The check that generators do what they report: a sample of their trajectories is scored again."""

    share: float = setting(
        0.01,
        "share of every generator's trajectories that the trainer scores again under the version they name; more "
        "while a generator is new, and one in every 20 groups at least; 0 checks none",
        unit="share of trajectories",
        min=0,
        max=1,
    )
    rewards: Literal["auto", "always", "prompts", "none"] = setting(
        "auto",
        "which of the sampled episodes are played again, to compare rewards and what the environment said: auto: "
        "those of a task that says it is repeatable (a data set's own reward: where it is a plain function); always: "
        "all; prompts: none, only their prompts are compared; none: nothing is, which saves a process",
    )
    memory_mb: int = setting(
        1024,
        "memory for weights of earlier versions, beyond the two that shared memory holds (of each rank, where the "
        "trainer is sharded); tokens of versions that are not held are not scored",
        unit="MB",
        min=0,
        max=100_000_000,
    )
