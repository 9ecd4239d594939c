"""The charts of the report: which metrics stand together, and curves thin enough to draw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Metrics that share one pair of axes. Example: `Chart(section=LEARNING, title="Entropy", keys=("entropy",))`."""

    section: str
    title: str
    keys: tuple[str, ...]
    log: bool = False
    """logarithmic axis"""


LEARNING, POLICY, OBJECTIVE, LEFT_OUT, FLOW, OTHER = (
    "Learning",
    "How far off policy",
    "What the objective did",
    "What was left out",
    "Flow",
    "Everything else",
)
REWARD = Chart(section=LEARNING, title="Reward", keys=("reward/mean", "reward/eval"))
CHARTS: tuple[Chart, ...] = (
    REWARD,
    Chart(section=LEARNING, title="Entropy", keys=("entropy",)),
    Chart(section=LEARNING, title="Gradient norm", keys=("grad/norm",), log=True),
    Chart(section=LEARNING, title="Length of answers", keys=("len/mean", "len/kept")),
    Chart(section=LEARNING, title="Learning rate", keys=("lr/base", "lr/effective")),
    Chart(
        section=LEARNING,
        title="Alarms",
        keys=("alarm/ess", "alarm/reference", "alarm/entropy", "alarm/gradient", "alarm/reward"),
    ),
    Chart(section=LEARNING, title="Groups without a signal", keys=("group/zero_signal",)),
    Chart(section=POLICY, title="Effective sample size", keys=("ess/ratio", "ess/reference", "ess/ratio_clipped")),
    Chart(section=POLICY, title="Noise of fresh data", keys=("ess/noise",), log=True),
    Chart(section=POLICY, title="Effective sample size, tokens", keys=("ess/token",)),
    Chart(section=POLICY, title="Staleness", keys=("lag/mean", "lag/max", "lag/p95")),
    Chart(section=POLICY, title="Where staleness arose", keys=("lag/queue", "lag/flight", "lag/span")),
    Chart(
        section=POLICY, title="Divergence from the policy that sampled", keys=("kl/behaviour", "kl/mismatch"), log=True
    ),
    Chart(section=POLICY, title="Spread of the log-weights", keys=("is/log_weight_std",)),
    Chart(section=OBJECTIVE, title="Learning-rate factors", keys=("lr/ess_scale", "lr/kappa", "lr/rollback")),
    Chart(section=OBJECTIVE, title="Clipped tokens", keys=("clip/frac", "clip/frac_pos", "clip/frac_neg")),
    Chart(section=OBJECTIVE, title="Clipping bias", keys=("clip/bias",)),
    Chart(section=OBJECTIVE, title="OPOB baseline", keys=("opob/baseline", "opob/max_weight_share")),
    Chart(
        section=OBJECTIVE,
        title="Gradient norm of a trajectory",
        keys=("grad/norm_per_trajectory_median", "grad/norm_per_trajectory_max"),
        log=True,
    ),
    Chart(section=OBJECTIVE, title="KL regulariser", keys=("kl/regulariser", "kl/coefficient")),
    Chart(section=LEFT_OUT, title="Rejected by the objective", keys=("reject/tokens", "reject/trajectories")),
    Chart(section=LEFT_OUT, title="Groups refused by the buffer", keys=("groups/refused",)),
    Chart(section=LEFT_OUT, title="Episodes that failed", keys=("episodes/failed",)),
    Chart(section=LEFT_OUT, title="Length of what was left out", keys=("len/refused", "len/rejected")),
    Chart(
        section=FLOW,
        title="Seconds of a step",
        keys=("time/step", "time/wait_for_batch", "time/publish"),
    ),
    Chart(section=FLOW, title="Tokens a second", keys=("tokens_per_s/trained", "tokens_per_s/generated")),
    Chart(section=FLOW, title="Slots", keys=("slots/used", "slots/all")),
    Chart(section=FLOW, title="Generators at work", keys=("busy/generators", "generators")),
    Chart(section=FLOW, title="Canary: log-probs of the probe", keys=("canary/max_difference",), log=True),
)


def charts_for(keys: Iterable[str]) -> list[Chart]:
    """The charts that these metrics fill; metrics without a chart come last, each on one of its own."""
    there = set(keys)
    found = []
    for chart in CHARTS:
        if kept := tuple(key for key in chart.keys if key in there):
            found.append(replace(chart, keys=kept))
        if chart is REWARD:
            found += _parts(there)
    placed = {key for chart in (*CHARTS, *found) for key in chart.keys}
    return found + [Chart(section=OTHER, title=key, keys=(key,)) for key in sorted(there - placed)]


def _parts(there: set[str]) -> list[Chart]:
    """A chart for each named part of the reward, in training and held out."""
    names = {key.split("/")[1] for key in there if key.startswith("reward/") and key.count("/") == 2}
    return [
        Chart(section=LEARNING, title=f"Reward: {name}", keys=tuple(key for key in pair if key in there))
        for name in sorted(names)
        for pair in [(f"reward/{name}/mean", f"reward/{name}/eval")]
    ]


MOST_POINTS = 1200
"""a longer curve is drawn as this many buckets, which is more than a plot has columns on a screen"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric against step. A point is one step, or a bucket of steps with its mean, lowest and highest value, so that
    no spike is lost."""

    step: NDArray[np.float64]  # [points]
    """the first step of a bucket"""
    mean: NDArray[np.float64]  # [points]
    low: NDArray[np.float64] | None  # [points]
    """None: each point is one step"""
    high: NDArray[np.float64] | None  # [points]
    not_finite: int
    """values that were NaN or infinite, which cannot be drawn"""


def curve(step: NDArray[np.float64], value: NDArray[np.float64], *, absent: NDArray[np.bool_]) -> Curve | None:
    """The curve of one metric. None when there is no value, neither finite nor broken.

    Args:
        step: [rows]
        value: [rows], NaN where it cannot be drawn
        absent: [rows], True where the row lacks the metric, which is no broken value
    """
    finite = np.isfinite(value)
    not_finite = int((~finite & ~absent).sum())
    step, value = step[finite], value[finite]
    if not len(step) and not not_finite:
        return None
    if len(step) <= MOST_POINTS:
        return Curve(step=step, mean=value, low=None, high=None, not_finite=not_finite)
    starts = np.unique(np.linspace(0, len(step), MOST_POINTS, endpoint=False).astype(np.int64))
    counts = np.diff(np.append(starts, len(step)))
    return Curve(
        step=step[starts],
        mean=np.add.reduceat(value / np.repeat(counts, counts), starts),  # the sum alone could overflow
        low=np.minimum.reduceat(value, starts),
        high=np.maximum.reduceat(value, starts),
        not_finite=not_finite,
    )
