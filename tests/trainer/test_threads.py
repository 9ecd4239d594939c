"""A step on several threads gives the same bits every time: a replay on as many threads is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support_run import quick_settings

from async_rl.trainer.build import make_learner
from async_rl.trainer.packing import pack_step
from async_rl.trajectory import Trajectory, Turn, VersionSpan


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trajectories() -> list[Trajectory]:
    """128 of them, eight of which begin alike: rows that several documents go on from, tokens that come often."""
    random = np.random.default_rng(0)
    made = []
    for number in range(128):
        if number % 8 == 0:
            prompt = random.integers(0, 12, 6)
        tokens = np.concatenate([prompt, random.integers(0, 12, 20)]).astype(np.int32)
        made.append(
            Trajectory(
                group=number // 8,
                sample=number % 8,
                problem=0,
                split="train",
                seed=number,
                tokens=tokens,
                log_behaviour=np.where(np.arange(26) < 6, 0, -2.5).astype(np.float32),
                turns=(Turn(start=6, length=20),),
                versions=(VersionSpan(version=0, start=6, end=26),),
                reward=float(random.integers(0, 2)),
                ended="finished",
            )
        )
    return made


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("recipe", [pytest.param("grpo", marks=pytest.mark.nightly), "vcpo"])
def test_a_step_on_two_threads_is_repeated_bit_for_bit(tiny_model: Path, recipe: str) -> None:
    settings = quick_settings(tiny_model, f"recipe={recipe}")
    settings = replace(settings, batch=replace(settings.batch, groups_per_step=16, group_size=8))
    found = set()
    for _ in range(5):
        learner = make_learner(settings)
        for _ in range(2):
            assert not learner.step(pack_step(settings, trajectories())).skipped
        found.add(b"".join(p.detach().numpy().tobytes() for p in learner.model.parameters()))
    assert len(found) == 1
