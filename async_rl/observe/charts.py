"""Which metrics stand together on one chart, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
