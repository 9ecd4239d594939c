"""`reward/mean` and `len/mean`: one definition, in the row of a step, in a preview and for recipe functions alike."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import support_ranks as support
from support_story import Story

from async_rl.config import GuardSettings, UpdatesSettings
from async_rl.objective.library import load_recipe
from async_rl.observe.record import read_run
from async_rl.trainer.alarm import CollapseWatch
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

NAN = float("nan")
LENGTHS = (4, 7, 5, 0, 6, 3)
REWARDS = (0.0, 1.0, NAN, 1.0, 0.5, float("inf"))
BROKEN = 4
"""a log-prob of this trajectory is NaN"""
WANTED = {"reward/mean": fmean([0.0, 1.0, 1.0]), "len/mean": fmean([4, 7])}
"""docs/metrics.md: trajectories with a number that is not finite are left out, of the length those without a token"""
OWN = """
import torch
from async_rl import Coefficients
def mine(columns):
    return Coefficients(policy=torch.ones_like(columns.log_prob))
"""


def trajectory(sample: int, length: int, reward: float, *, broken: bool) -> Trajectory:
    log_behaviour = np.full(3 + length, -1.0, np.float32)
    if broken:
        log_behaviour[4] = NAN
    return Trajectory(
        group=0, sample=sample, problem=0, split="train", seed=0, tokens=np.arange(3 + length, dtype=np.int32),
        log_behaviour=log_behaviour, turns=(Turn(start=3, length=length),) if length else (),
        versions=(VersionSpan(version=0, start=3, end=3 + length),) if length else (), reward=reward, ended="finished",
    )  # fmt: skip


def batch_of(rewards: tuple[float, ...], *, broken: int = -1) -> PackedBatch:
    made = [trajectory(i, LENGTHS[i], reward, broken=i == broken) for i, reward in enumerate(rewards)]
    return pack_batch(made, micro_batch_tokens=1000)


def learner(recipe: str, updates: int = 1) -> Learner:
    options = LearnerOptions(
        steps=10, updates=UpdatesSettings(epochs=updates), optimizer=support.OPTIMIZER, arithmetic=support.ARITHMETIC
    )
    return Learner(support.make_model(support.TIED, 1), load_recipe({"name": recipe}), options)


@pytest.mark.parametrize(("recipe", "updates"), [("grpo", 1), ("grpo", 2), ("vcpo", 1), ("mine", 1)])
def test_a_step_and_a_preview_say_the_documented_means(recipe: str, updates: int, tmp_path: Path) -> None:
    if recipe == "mine":
        (tmp_path / "mine.py").write_text(OWN)
        recipe = f"{tmp_path / 'mine.py'}:mine"
    trained, batch = learner(recipe, updates), batch_of(REWARDS, broken=BROKEN)
    previewed, stepped = trained.preview(batch).metrics, trained.step(batch).metrics
    for key, value in WANTED.items():
        assert previewed[key] == pytest.approx(value)
        assert stepped[key] == pytest.approx(value)


def test_a_batch_without_a_finite_reward_has_no_mean_and_the_report_leaves_a_gap(
    tmp_path: Path, tiny_model: Path
) -> None:
    metrics = learner("grpo").step(batch_of((NAN, NAN))).metrics
    assert not WANTED.keys() & metrics.keys()
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=2).write()
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": 1, **metrics}) + "\n")
    shown = read_run(folder.path).column("reward/mean")
    assert np.isfinite(shown).tolist() == [True, False]


def test_the_reward_alarm_reads_the_mean_of_the_finite_rewards() -> None:
    """A NaN in every batch hides no collapse, and batches without any reward are none."""
    trained = learner("grpo")
    settings = GuardSettings(ess=0.0, entropy=0.0, gradient=0.0)
    watch, raised = CollapseWatch(settings=settings), []
    for step in range(6 * settings.window):
        if step % 7 == 3:
            rewards: tuple[float, ...] = (NAN, NAN)
        elif step < 3 * settings.window:
            rewards = (1.0, 1.0 - 0.25 * (step % 2), NAN)
        else:
            rewards = (0.0, 0.25 * (step % 2), NAN)
        raised += watch.check({"step": step, **trained.step(batch_of(rewards)).metrics})
        assert not raised or step >= 3 * settings.window
    assert [alarm.signal for alarm in raised] == ["reward"]
