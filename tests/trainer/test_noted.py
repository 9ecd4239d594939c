"""What a task notes reaches the columns of the objective under its name, in the order of the batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_run import quick_settings
from torch import Tensor

from async_rl.objective import Coefficients, Columns
from async_rl.objective.library import load_recipe
from async_rl.objective.own import needs_columns
from async_rl.objective.recipe import requirements
from async_rl.trainer.packing import pack_batch, pack_step
from async_rl.trajectory import Trajectory, Turn, VersionSpan

NAN = math.nan


def made(group: int, sample: int, info: dict[str, float | str], *turns: dict[str, Any]) -> Trajectory:
    """Turns of two tokens behind a prompt of one."""
    size = 1 + 2 * len(turns)
    return Trajectory(
        group=group, sample=sample, problem=0, split="train", seed=0,
        tokens=np.ones(size, np.int32), log_behaviour=np.full(size, -1.0, np.float32),
        turns=tuple(Turn(start=1 + 2 * i, length=2, **how) for i, how in enumerate(turns)),
        versions=(VersionSpan(version=0, start=0, end=size),), reward=float(sample), ended="finished", info=info,
    )  # fmt: skip


BATCH = [  # not in order
    made(1, 1, {"void": "text", "reward/format": 1.0}, {"token_notes": (("teacher", (-1.0, -2.0)),)}),
    made(0, 0, {"void": 1.0}, {"notes": (("void", 2.0),)}, {}),
    made(1, 0, {"reward/format": 0.0, "reward/right": 1.0}, {"notes": (("void", 0.0), ("x", 1.0))}),
]


def same(found: Tensor, wanted: list[float]) -> bool:
    return torch.equal(found.nan_to_num(nan=-99.0), torch.tensor(wanted).nan_to_num(nan=-99.0))


@needs_columns(noted=("void", "teacher", "never"))
def reads_notes(columns: Columns) -> Coefficients:
    void = columns.noted.trajectory["void"].nan_to_num(nan=0.0)
    return Coefficients(policy=void[columns.trajectory_of_turn[columns.turn_of_token]].to(columns.log_prob.dtype))


def test_notes_become_columns_of_the_names_that_the_recipe_asks_for() -> None:
    needs = requirements(load_recipe({"name": f"{__name__}:reads_notes"}))
    noted = pack_batch(BATCH, micro_batch_tokens=64, needs=needs).noted
    assert same(noted.trajectory["void"], [1.0, NAN, NAN])
    assert same(noted.turn["void"], [2.0, NAN, 0.0, NAN])
    assert same(noted.token["teacher"], [NAN] * 6 + [-1.0, -2.0])
    assert set(noted.trajectory) | set(noted.turn) | set(noted.token) == {"void", "teacher"}


def test_a_recipe_that_asks_for_nothing_gets_nothing() -> None:
    noted = pack_batch(BATCH, micro_batch_tokens=64, needs=requirements(load_recipe({"name": "grpo"}))).noted
    assert not noted.trajectory
    assert not noted.turn
    assert not noted.token


@pytest.mark.parametrize(("recipe", "names"), [("gdpo", {"reward/format", "reward/right"}), ("simple_tir", {"void"})])
def test_a_step_is_packed_with_what_its_recipe_reads(recipe: str, names: set[str]) -> None:
    settings = quick_settings(Path("m"), f"recipe={recipe}", "task.reward_weights.format=0.5")
    batch = pack_step(settings, BATCH)
    assert set(batch.noted.trajectory) == names
    assert dict(batch.noted.weights) == ({"format": 0.5} if recipe == "gdpo" else {})
