"""The column of the teachers' log-probs: what transformers computes, weighted, where each of them speaks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed
from support_models import qwen3_folder
from support_run import quick_settings
from support_teacher import TeacherModel

from async_rl.errors import UserError
from async_rl.instruments.lab.exact_lag import train_with_exact_lag
from async_rl.model.create import create_model_folder
from async_rl.trainer.build import make_learner
from async_rl.trainer.learner import StepReport
from async_rl.trainer.packing import pack_step
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.turn_notes import noted_tokens

PARTS = ("recipe=on_policy_distillation", "trainer.micro_batch_tokens=16")


def trajectories() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    made = []
    for sample in range(4):
        tokens = rng.integers(0, 10, 6 + sample).astype(np.int32)
        size = len(tokens)
        made.append(
            Trajectory(
                group=sample // 2, sample=sample % 2, problem=0, split="train", seed=0, tokens=tokens,
                log_behaviour=np.full(size, -1.0, np.float32),
                turns=(Turn(start=1, length=2), Turn(start=4, length=size - 4)),
                versions=(VersionSpan(version=0, start=0, end=size),), reward=float(sample), ended="finished",
                info={"source": "math" if sample % 2 else "code"},
            )
        )  # fmt: skip
    return made


def own_alphabet(folder: Path, seed: int) -> Path:
    from async_rl.task import make_task

    create_model_folder(
        folder, alphabet=make_task("guess", {}).alphabet, hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8,
        intermediate=32, seed=seed,
    )  # fmt: skip
    return folder


def of_policy(model: TeacherModel, trajectory: Trajectory) -> list[float]:
    every = [math.nan, *model.log_probs(trajectory.tokens.tolist())]
    return [v for turn in trajectory.turns for v in every[turn.start : turn.start + turn.length]]


def test_folder_teachers_are_weighed_where_they_speak(tiny_model: Path, tmp_path: Path) -> None:
    one, two = own_alphabet(tmp_path / "one", 1), own_alphabet(tmp_path / "two", 2)
    settings = quick_settings(
        tiny_model, *PARTS, f"teachers.one.path={one}", f"teachers.two.path={two}", "teachers.two.weight=3",
        "teachers.two.only=source=math",
    )  # fmt: skip
    learner, batch = make_learner(settings), pack_step(settings, trajectories())
    assert len(batch.micro_batches) > 1
    assert learner.teachers is not None
    found = learner.teachers.log_probs(batch).tolist()
    first, second = TeacherModel(one), TeacherModel(two)
    wanted: list[float] = []
    for trajectory in trajectories():
        a, b = of_policy(first, trajectory), of_policy(second, trajectory)
        both = trajectory.info["source"] == "math"
        wanted += [(x + 3 * y) / 4 if both else x for x, y in zip(a, b, strict=True)]
    assert found == pytest.approx(wanted, abs=2e-5)


def test_a_servers_notes_are_its_column_and_their_absence_leaves_a_trajectory_out(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, *PARTS, "teachers.big.address=http://nowhere/v1")
    noted = [
        changed(t, turns=tuple(noted_tokens(turn, "teacher/big", [-0.5] * turn.length) for turn in t.turns))
        for t in trajectories()
    ]
    learner = make_learner(settings)
    whole = pack_step(settings, noted)
    assert learner.teachers is not None
    assert torch.equal(learner.teachers.log_probs(whole), torch.full((whole.num_policy_tokens,), -0.5))
    report = learner.step(pack_step(settings, [*noted[:3], trajectories()[3]]))
    assert not report.skipped
    assert report.metrics["reject/no_teacher/trajectories"] == 1
    assert 0 < report.metrics["teacher/missing"] < 1
    none = learner.step(pack_step(settings, trajectories()))
    assert "no_teacher 4" in none.skipped


def test_the_policy_comes_nearer_to_its_teacher(tiny_model: Path, tmp_path: Path) -> None:
    """On its own samples the reverse KL falls, whatever their rewards."""
    settings = quick_settings(
        tiny_model, *PARTS, f"teachers.one.path={own_alphabet(tmp_path / 'one', 1)}", "optimizer.warmup_steps=0",
        "optimizer.learning_rate=3e-3", "trainer.steps=8", "staleness.max_staleness=1",
    )  # fmt: skip
    reports: list[StepReport] = []
    train_with_exact_lag(settings, each_batch=lambda _: None, each_step=lambda _, report: reports.append(report))
    measured = [report.metrics["teacher/kl"] for report in reports]
    assert sum(measured[-2:]) < 0.5 * sum(measured[:2])


def test_a_teacher_of_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = qwen3_folder(tmp_path / "other")
    settings = quick_settings(tiny_model, *PARTS, f"teachers.one.path={other}")
    with pytest.raises(UserError, match="whose tokenizer is another one than the model's: token"):
        make_learner(settings)
