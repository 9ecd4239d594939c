"""What a run came to, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from async_rl.trainer.canary import CanarySummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`summary.json` of a run."""

    steps: int
    reward_eval_first: float
    """held-out reward before training"""
    reward_eval_last: float
    lag_mean: float
    """staleness of trained tokens, steps"""
    lag_max: int
    max_staleness: int
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
    canary: CanarySummary
    model: str
    """folder of the trained model"""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def summarise(
    *,
    rows: Sequence[Mapping[str, float]],
    first: float,
    last: float,
    detail: Mapping[str, float],
    canary: CanarySummary,
    seconds: float,
    max_staleness: int,
    model: str,
) -> Summary:
    """From the run's metric rows (of all its lives), its held-out rewards and the buffer's counters."""
    busy = [row["time/generator_busy"] for row in rows]
    generating = (busy[-1] - busy[0]) / max(1.0, rows[-1]["generators"]) if rows else 0.0
    training = sum(row["time/step"] for row in rows)
    tokens = sum(row["batch/policy_tokens"] for row in rows)
    return Summary(
        steps=len(rows),
        reward_eval_first=first,
        reward_eval_last=last,
        lag_mean=sum(row["lag/mean"] * row["batch/policy_tokens"] for row in rows) / max(1.0, tokens),
        lag_max=int(max((row["lag/max"] for row in rows), default=0)),
        max_staleness=max_staleness,
        ess_mean=mean([row["ess/ratio"] for row in rows if "ess/ratio" in row]),
        seconds=seconds,
        seconds_training=training,
        seconds_generating=generating,
        overlap_efficiency=max(training, generating) / max(seconds, 1e-9),
        tokens_generated=int(rows[-1]["tokens/generated"]) if rows else 0,
        tokens_trained=int(tokens),
        groups_admitted=int(detail.get("groups_admitted", 0)),
        groups_trained=int(detail.get("groups_trained", 0)),
        groups_refused=int(detail.get("groups_refused", 0)),
        trajectories_failed=int(detail.get("trajectories_failed", 0)),
        canary=canary,
        model=model,
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
