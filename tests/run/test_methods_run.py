"""Runs of separate processes with methods whose mechanism is the answer that a task notes, a filter before the forward
pass, a number that is held, a tree, parts of the reward, a teacher, pieces of episodes, a median, a proxy, or the
policy at the start of a step: audited, resumed, and replayed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training
from async_rl.run_folder import read_rows

pytestmark = pytest.mark.nightly
TASK = """
from async_rl.task.guess import Guess


class Answered(Guess):
    noted = ("answer",)

    async def rollout(self, problem, session):
        text = await session.generate(max_tokens=self.num_digits)
        session.note("answer", sum(map(ord, text)))
        return float(len(text) > 1)


class Parted(Guess):
    async def rollout(self, problem, session):
        text = await session.generate(max_tokens=self.num_digits)
        return {"long": float(len(text) > 1), "sum": sum(map(ord, text)) / 100}
"""
CASES = {
    "ttrl": ("reward/mean",),
    "pods": ("reject/surplus/trajectories", "recipe.select.keep_in_group=1"),
    "skywork_or1": (
        "controlled/entropy",
        "recipe.controller=[{number: entropy, metric: entropy, target: 9.0, law: step, rate: 0.01}]",
    ),
    "tree_grpo": ("reward/mean", "rollout.roots=1", "rollout.fork=even"),
    "kimi_k15": ("len/mean",),
    "rent": ("entropy",),
    "gdpo": ("reward/mean", "task.name={file}:Parted"),
    "on_policy_distillation": ("teacher/kl", "teachers.big.path={model}"),
    "t_ppo": ("len/mean", "task.name=guess", "rollout.window=3", "batch.group_size=1", "batch.groups_per_step=8"),
    "bpo": ("value/loss",),
    "lp_reg": ("kl/regulariser",),
    "remix": ("reward/mean", "pool.source=groups", "pool.share=0.4", "updates.epochs=2"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(CASES))
def test_a_run_is_resumed_and_replayed_bit_for_bit(tmp_path: Path, tiny_model: Path, recipe: str) -> None:
    file = tmp_path / "answered.py"
    file.write_text(TASK)
    metric, *changes = (
        said.format(file=file, model=tiny_model) if "=[" not in said else said for said in CASES[recipe]
    )
    settings = quick_settings(
        tiny_model, f"task.name={file}:Answered", "trainer.steps=3", f"recipe={recipe}", "checkpoint.every=1", *changes
    )
    folder = train(settings, tmp_path / "run")
    resume_training(folder.path, ["trainer.steps=5"], console=Console(quiet=True), accepted=())
    assert all(metric in row for row in read_rows(folder.metrics))
    assert replay(folder).difference is None
    assert not audit_run(folder).violations
