"""Which metrics stand together on one chart, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
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
CHARTS: tuple[Chart, ...] = (
    Chart(section=LEARNING, title="Reward", keys=("reward/mean", "reward/eval")),
    Chart(section=LEARNING, title="Entropy", keys=("entropy",)),
    Chart(section=LEARNING, title="Gradient norm", keys=("grad/norm",), log=True),
    Chart(section=LEARNING, title="Length of answers", keys=("len/mean", "len/kept")),
    Chart(section=LEARNING, title="Learning rate", keys=("lr/base", "lr/effective")),
    Chart(section=LEARNING, title="Alarms", keys=("alarm/ess", "alarm/entropy", "alarm/gradient", "alarm/reward")),
    Chart(section=LEARNING, title="Groups without a signal", keys=("group/zero_signal",)),
    Chart(section=POLICY, title="Effective sample size", keys=("ess/ratio", "ess/reference", "ess/ratio_clipped")),
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
DERIVED = {
    "tokens_per_s/trained": "policy tokens trained a second of wall time, from one step's end to the next",
    "tokens_per_s/generated": "policy tokens generated a second of wall time",
    "busy/generators": "share of the time in which the generators decoded (time/generator_busy), on average over them",
}
"""metrics that are computed here from those of metrics.jsonl, and what they mean"""


def charts_for(keys: Iterable[str]) -> list[Chart]:
    """The charts that these metrics fill, those without a place of their own at the end, each alone."""
    there = list(keys)
    known = set(there)
    found = []
    for chart in CHARTS:
        kept = tuple(key for key in chart.keys if key in known)
        if kept:
            found.append(Chart(section=chart.section, title=chart.title, keys=kept, log=chart.log))
    placed = {key for chart in CHARTS for key in chart.keys}
    return found + [Chart(section=OTHER, title=key, keys=(key,)) for key in _rest(there, placed)]


def _rest(keys: Sequence[str], placed: set[str]) -> list[str]:
    return sorted(key for key in keys if key not in placed)


# -------------------- curves
# Curves thin enough to draw, on which no spike is lost.

MOST_POINTS = 1200
"""longer curves are drawn as this many buckets: more than a screen has columns for one plot"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric against step. Of a bucket of several steps: mean, lowest and highest value."""

    step: NDArray[np.float64]  # [points]
    """of a bucket: its first step"""
    mean: NDArray[np.float64]  # [points]
    low: NDArray[np.float64] | None  # [points]
    """None: every point is one step"""
    high: NDArray[np.float64] | None  # [points]
    not_finite: int
    """values that were NaN or infinite, which cannot be drawn"""


def curve(step: NDArray[np.float64], value: NDArray[np.float64], *, absent: NDArray[np.bool_]) -> Curve | None:
    """`absent`: rows that lack the metric. None when no value can be drawn and none is broken."""
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


# -------------------- glossary
# What each metric means, out of docs/metrics.md: written once, there.

PAGE = Path(__file__).parent / "metrics.md"
"""a link to docs/metrics.md; in a wheel a copy"""
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$")


@cache
def meanings() -> Mapping[str, str]:
    """Key to definition as plain text, among them patterns such as `reject/<reason>/tokens`."""
    return MappingProxyType(parse(PAGE.read_text()))


def parse(text: str) -> dict[str, str]:
    """The definitions of a page: rows of tables whose first cell is one key in backticks."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        row = _ROW.match(line)
        if row:
            found[row[1]] = row[2].replace("\\|", "|").replace("`", "")
    return found


def meaning(key: str) -> str:
    """The definition of a metric; empty when the page has none."""
    known = meanings()
    if key in known:
        return known[key]
    for pattern, text in known.items():
        if "<" in pattern and re.fullmatch(re.sub(r"<\w+>", "[^/]+", pattern), key):
            return text
    return ""
