"""Settings of the experience pool: stored trajectories and demonstrations that come back (docs/howto/pool.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting


@dataclass(frozen=True)
class PoolSettings:
    """Stored trajectories and demonstrations that come back in later batches."""

    source: Literal["none", "groups", "successes", "best", "priority", "demonstrations"] = setting(
        "none",
        "what comes back: whole groups of earlier batches; single successes; the best of each problem; "
        "trajectories drawn by pool.priority; demonstrations from pool.file; none: nothing",
    )
    place: Literal["extra", "join", "replace", "instead"] = setting(
        "extra",
        "where: extra rows of the batch, in groups of their own; join: as further samples of a fresh group of the "
        "same problem; replace: in place of samples of such a group; instead: in place of the whole group (successes, "
        "best and demonstrations of its problem, priority of any). Fresh samples that give their place up stay in the "
        "batch without effect",
    )
    when: Literal["always", "failed", "no_signal"] = setting(
        "always",
        "join, replace, instead: which fresh groups: all; those that failed (mean reward at most pool.gate); those "
        "without signal (equal rewards, at most pool.gate)",
    )
    gate: float = setting(0.0, "failed, no_signal: mean reward of a group up to which it is one", unit="reward")
    rows: int = setting(
        1, "extra: trajectories (groups: groups) a step; else: for each such group", unit="rows", min=1, max=100_000
    )
    share: float = setting(
        0.0,
        "extra: share of the batch's trajectories (groups: of its groups) that comes from the pool, in place of "
        "pool.rows; 0: pool.rows",
        unit="share of the batch",
        min=0,
        below=1,
    )
    priority: Literal["signal", "advantage", "reward", "recency"] = setting(
        "signal",
        "priority: drawn in proportion to |advantage|, the advantage, the reward, or 1 / (1 + age). The advantage is "
        "that within its group, when it was fresh",
    )
    above: float = setting(
        0.0,
        "what is kept: trajectories whose reward (successes, best, priority=reward), advantage or |advantage| "
        "(priority) is above",
    )
    max_age: int = setting(
        20,
        "steps after the weights of its oldest token up to which a trajectory comes back; 0: no bound. "
        "staleness.max_staleness is the bound of fresh ones",
        unit="steps",
        min=0,
        max=1_000_000_000,
    )
    max_uses: int = setting(0, "times that one comes back; 0: no bound", unit="times", min=0, max=1_000_000)
    per_problem: int = setting(
        8,
        "trajectories kept of one problem, the newest (best: those of the highest reward)",
        unit="trajectories",
        min=1,
        max=1_000_000,
    )
    size: int = setting(4096, "trajectories kept in all, the newest", unit="trajectories", min=1, max=1_000_000)
    flush_at: int = setting(
        0,
        "extra: nothing comes back until so many trajectories are kept, then all do at once (SPEAR); 0: pool.rows a "
        "step",
        unit="trajectories",
        min=0,
        max=1_000_000,
    )
    until: int = setting(0, "step from which nothing comes back any more; 0: never", unit="steps", min=0)
    file: str = setting(
        "",
        "demonstrations: a file of rows with `prompt` and `answer`, or `messages`; `problem`, the number of the "
        "training problem that it answers, and `reward` (1) where it has another",
    )
