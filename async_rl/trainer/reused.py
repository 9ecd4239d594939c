"""Rows of a batch that came back from the experience pool: as columns for the objective, and in the metric row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from async_rl.objective.tokens import Reused
from async_rl.trajectory import Trajectory
from async_rl.trajectory.reuse import SOURCES, has_no_effect, reuse_of


def reused_columns(ordered: Sequence[Trajectory], device: str | torch.device) -> Reused | None:
    """Of trajectories in the order of their batch, [I] each; None where nothing came back."""
    rows = [reuse_of(t) for t in ordered]
    if not any(rows):
        return None
    shown = [row is not None and row.source == "demonstrations" for row in rows]

    def numbers(name: str, without: float) -> torch.Tensor:  # [I] float32
        values = [without if row is None else getattr(row, name) for row in rows]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def flags(values: Sequence[bool]) -> torch.Tensor:  # [I] bool
        return torch.tensor(values, dtype=torch.bool, device=device)

    return Reused(
        source=torch.tensor([-1 if row is None else SOURCES.index(row.source) for row in rows], device=device),
        replayed=flags([row is not None and not one for row, one in zip(rows, shown, strict=True)]),
        demonstration=flags(shown),
        out=flags([has_no_effect(t) for t in ordered]),
        advantage=numbers("advantage", 0.0),
        baseline=numbers("baseline", 0.0),
        scale=numbers("scale", 1.0),
    )


def reuse_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """pool/*: how many rows came back by source, how old and how often; nothing where there is no pool."""
    found = [(t, row) for t in trajectories if (row := reuse_of(t)) is not None]
    if not found:
        return {}
    by_source = Counter(row.source for _, row in found)
    replayed = [row for _, row in found if row.source != "demonstrations"]
    return {
        "pool/rows": float(len(found)),
        **{f"pool/rows/{source}": float(count) for source, count in sorted(by_source.items())},
        "pool/replaced": float(sum(has_no_effect(t) for t in trajectories)),
        "pool/reward": sum(t.reward for t, _ in found) / len(found),
        "pool/uses": sum(row.uses for _, row in found) / len(found),
        **({"pool/age": sum(row.age for row in replayed) / len(replayed)} if replayed else {}),
        **({"pool/age_max": float(max(row.age for row in replayed))} if replayed else {}),
    }
