"""What a run came to: totals of its metric rows, and `summary.json` made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import numpy as np

from async_rl.config import StalenessSettings
from async_rl.trainer.alarm import Alarm, Guard
from async_rl.trainer.canary_watch import CanarySummary
from async_rl.wire.messages import BufferCounters

RESAMPLES = 2000
"""of the bootstrap"""


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over the run's metric rows that the summary needs, so that no row is kept."""

    steps: int = 0
    training: float = 0.0
    """seconds inside steps"""
    tokens: float = 0.0
    lag: float = 0.0
    """staleness times tokens"""
    lag_max: float = 0.0
    ess: float = 0.0
    ess_steps: int = 0
    pool: Counter[str] = field(default_factory=Counter)
    """what came back from the experience pool: rows by source, fresh trajectories replaced, the largest age in steps"""
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the metric row of the next step."""
        self.steps += 1
        self.training += row["time/step"]
        self.tokens += row["batch/policy_tokens"]
        if "lag/mean" in row:  # absent when no trajectory of the batch has a token
            self.lag += row["lag/mean"] * row["batch/policy_tokens"]
            self.lag_max = max(self.lag_max, row["lag/max"])
        if "pool/rows" in row:
            for key, value in row.items():
                if key.startswith("pool/rows/"):
                    self.pool[key.removeprefix("pool/rows/")] += int(value)
            self.pool["replaced"] += int(row["pool/replaced"])
            self.pool["age_max"] = max(self.pool["age_max"], int(row.get("pool/age_max", 0)))
        if "ess/ratio" in row:
            self.ess += row["ess/ratio"]
            self.ess_steps += 1
        self.first = self.first or row
        self.last = row

    @property
    def generator_busy(self) -> float:
        """Seconds inside model steps, as of the last row."""
        return float(self.last.get("time/generator_busy", 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`summary.json` of a run."""

    steps: int
    reward_eval_first: float
    """held-out reward before training"""
    reward_eval_last: float
    eval_failed_first: int
    """held-out episodes before training that failed; they are in no mean"""
    eval_failed_last: int
    reward_eval_gain: tuple[float, float] | None
    """95 % interval of the gain, by a bootstrap over episodes; None: not known"""
    lag_mean: float
    """staleness of trained tokens, steps"""
    lag_max: int
    max_staleness: int
    policy: str
    """staleness.policy"""
    depth: float
    """of the pipeline at the end, batches"""
    held_up: Mapping[str, float]
    """batches that waited for running groups although enough others were finished, seconds, and batches by
    generator waited for (by/NAME); since the last start of the run"""
    dropped: Mapping[str, float]
    """policy drop: groups, trajectories and tokens dropped as stale, mean policy lengths of dropped and trained
    trajectories, their quotient len_bias, and both counted by length; else empty"""
    pool: Mapping[str, int]
    """what came back from the experience pool: rows by source, fresh trajectories replaced, and age_max in steps;
    empty: nothing did"""
    ess_mean: float
    """mean effective sample size as a share of the batch"""
    seconds: float
    """wall time of the training steps"""
    seconds_training: float
    """inside training steps, waits excluded"""
    seconds_generating: float
    """inside the engine's model steps, mean over generators"""
    overlap_efficiency: float
    """max(seconds generating, seconds training) / seconds: 1 when the longer side never waits"""
    tokens_generated: int
    tokens_trained: int
    groups_admitted: int
    groups_trained: int
    groups_refused: int
    trajectories_failed: int
    failures: Mapping[str, int]
    """failed episodes by reason, held-out ones included; the most frequent reasons"""
    canary: CanarySummary
    alarms: tuple[Alarm, ...]
    """that stand at the end"""
    rollback: Mapping[str, Any] | None
    """version it went back at and to, why, with which factor on the learning rate; None: it did not"""
    model: str
    """folder of the trained model"""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def summarise(
    *,
    totals: Totals,
    first: float,
    first_rewards: Sequence[float],
    last_rewards: Sequence[float],
    counters: BufferCounters,
    canary: CanarySummary,
    guard: Guard,
    seconds: float,
    staleness: StalenessSettings,
    model: str,
) -> Summary:
    """From the totals of the run's metric rows (of all its lives), its held-out rewards and the buffer's counters."""
    generating = 0.0
    if totals.steps:
        busy = totals.generator_busy - totals.first["time/generator_busy"]
        generating = busy / max(1.0, totals.last["generators"])
    training, columns = totals.training, counters.metrics()
    return Summary(
        steps=totals.steps,
        reward_eval_first=first,
        reward_eval_last=mean_judged(last_rewards),
        eval_failed_first=len(first_rewards) - len(judged(first_rewards)),
        eval_failed_last=len(last_rewards) - len(judged(last_rewards)),
        reward_eval_gain=gain_interval(judged(first_rewards), judged(last_rewards)),
        lag_mean=totals.lag / max(1.0, totals.tokens),
        lag_max=int(totals.lag_max),
        max_staleness=staleness.max_staleness,
        policy=staleness.policy,
        depth=counters.pipeline_depth,
        held_up=_below("held_up/", columns),
        dropped=_below("drop/", columns),
        pool=dict(totals.pool),
        ess_mean=totals.ess / max(1, totals.ess_steps),
        seconds=seconds,
        seconds_training=training,
        seconds_generating=generating,
        overlap_efficiency=max(training, generating) / max(seconds, 1e-9),
        tokens_generated=int(totals.last.get("tokens/generated", 0.0)),
        tokens_trained=int(totals.tokens),
        groups_admitted=counters.groups_admitted,
        groups_trained=counters.groups_trained,
        groups_refused=counters.groups_refused,
        trajectories_failed=counters.trajectories_failed,
        failures=dict(counters.failures),
        canary=canary,
        alarms=tuple(guard.watch.raised.values()),
        rollback=guard.rollback.event().detail() if guard.rollback is not None else None,
        model=model,
    )


def _below(prefix: str, columns: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}


def judged(rewards: Sequence[float]) -> list[float]:
    """The rewards of the episodes that did not fail."""
    return [reward for reward in rewards if not isnan(reward)]


def mean_judged(rewards: Sequence[float]) -> float:
    """Mean reward of the episodes that did not fail; NaN: all did."""
    found = judged(rewards)
    return sum(found) / len(found) if found else nan


def gain_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of mean(after) - mean(before), by a bootstrap over episodes (Efron 1979); None without episodes.

    Each side gets one episode of the lowest and one of the highest reward of both, so that four equal rewards do not
    make a certainty (for rewards of 0 and 1 this is the idea of Agresti and Coull 1998)."""
    if not before or not after:
        return None
    ends = [min(*before, *after), max(*before, *after)]
    random = np.random.default_rng(0)
    sides = [np.array([*side, *ends]) for side in (before, after)]
    means = [random.choice(side, (RESAMPLES, len(side))).mean(1) for side in sides]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)
