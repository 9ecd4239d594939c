"""What the tasks of a batch noted, as columns by name (`objective.Noted`), and which teachers speak of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from async_rl.config.teachers import TeacherSettings
from async_rl.objective.recipe import Requirements
from async_rl.objective.tokens import Noted
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import PREFIX


def noted_columns(
    ordered: Sequence[Trajectory], needs: Requirements, weights: Mapping[str, float], device: str | torch.device
) -> Noted:
    """The columns that a recipe asks for, of trajectories in the order of their batch.

    weights: of the parts of rewards, `task.reward_weights`. A note that is text counts as none.
    """
    names = set(needs.noted)
    if needs.parts:
        names |= {name for t in ordered for name in t.info if name.startswith(PREFIX)}
    trajectory, turn, token = {}, {}, {}
    for name in sorted(names):
        if any(isinstance(t.info.get(name), float | int) for t in ordered):
            trajectory[name] = _tensor(([_number(t.info.get(name))] for t in ordered), device)
        if any(name in dict(one.notes) for t in ordered for one in t.turns):
            turn[name] = _tensor(([dict(one.notes).get(name, np.nan) for one in t.turns] for t in ordered), device)
        if any(name in dict(one.token_notes) for t in ordered for one in t.turns):
            token[name] = _tensor((_of_tokens(t, name) for t in ordered), device)
    return Noted(trajectory=trajectory, turn=turn, token=token, weights=dict(weights) if needs.parts else {})


def taught(
    trajectories: Sequence[Trajectory], teachers: Mapping[str, TeacherSettings], device: str | torch.device
) -> dict[str, Tensor]:
    """Name -> whether the teacher speaks of each trajectory, [I] bool; only of those that do not speak of all."""
    return {
        name: torch.tensor([teacher.speaks_of(t.info) for t in trajectories], dtype=torch.bool, device=device)
        for name, teacher in teachers.items()
        if teacher.only
    }


def _number(value: float | str | None) -> float:
    return float(value) if isinstance(value, float | int) else np.nan


def _of_tokens(trajectory: Trajectory, name: str) -> list[float]:
    """A number for each policy token, NaN where there is none. [policy tokens]"""
    found: list[float] = []
    for turn in trajectory.turns:
        found += dict(turn.token_notes).get(name, (np.nan,) * turn.length)
    return found


def _tensor(rows: Iterable[Sequence[float]], device: str | torch.device) -> Tensor:  # [all rows' numbers]
    return torch.tensor([value for row in rows for value in row], dtype=torch.float32, device=device)
