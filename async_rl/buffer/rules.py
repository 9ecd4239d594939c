"""The settings that the state machine obeys."""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.buffer.depth import DepthControl
from async_rl.buffer.staleness import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Example: `Rules(policy=policy, group_size=8, temperature=1.0, drop_zero_signal=False, max_failures=64,
    max_refusals=1000, seed=0)`."""

    policy: Policy
    group_size: int
    """trajectories of one group"""
    temperature: float
    drop_zero_signal: bool
    """refuse groups whose rewards are all equal, at once"""
    max_failures: int
    """trajectories in a row that may fail before the run ends"""
    max_refusals: int
    """groups in a row that may be refused before the run ends"""
    seed: int
    control: DepthControl | None = None
    """what moves the policy's depth during the run; None: it stays"""
    vocabulary: int = 0
    """tokens are below it; 0: not known"""
    max_permits: int = 1 << 31
    """most that one generator may have under way"""
    frozen_after_s: float = 15.0
    """a generator of which nothing was heard for so long is lost"""
    stall_report_s: float = 10.0
    """waits that last longer are reported"""
    how_to_join: str = ""
    """what follows "no generator is connected" where the launcher starts none"""
