"""An evaluation: held-out problems sampled by generators between training groups."""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.buffer.group import Group
from async_rl.wire.messages import EvaluationResult


@dataclass(slots=True, kw_only=True)
class Evaluation:
    version: int
    """weights at least this new"""
    groups: list[Group]
    """one per problem, not trained"""
    asked_at: float
    recorded: bool = False
    """its result is in the store"""


def evaluation_result(number: int, evaluation: Evaluation, now: float) -> EvaluationResult:
    """What has arrived so far; failed trajectories count as reward 0."""
    samples = [s for g in evaluation.groups for s in g.samples.values()]
    versions = [s.version_min for s in samples if s.version_min >= 0]
    newest = [s.version_max for s in samples if s.version_max >= 0]
    return EvaluationResult(
        evaluation=number,
        finished=all(g.complete for g in evaluation.groups),
        rewards=tuple(0.0 if s.failed else s.reward for s in samples),
        version_min=min(versions, default=-1),
        version_max=max(newest, default=-1),
        detail={
            "seconds": now - evaluation.asked_at,
            "missing": float(sum(len(g.missing) for g in evaluation.groups)),
            "policy_length": sum(s.policy_length for s in samples) / max(1, len(samples)),
        },
    )
