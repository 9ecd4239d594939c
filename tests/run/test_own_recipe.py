"""A run that is trained by a function of the user's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.config.schema import to_yaml
from async_rl.errors import UserError
from async_rl.instruments.replay import replay
from async_rl.instruments.rescore import rescore
from async_rl.run.resume import resumed_settings
from async_rl.run_folder import read_rows

STEPS = 3
FUNCTION = """
import torch
from async_rl import Coefficients, Columns


def reinforce(columns: Columns) -> Coefficients:
    group, reward = columns.group_of_trajectory, columns.reward.double()
    count = torch.bincount(group)
    advantage = reward - (torch.zeros(len(count)).double().index_add_(0, group, reward) / count)[group]
    of_token = columns.trajectory_of_turn[columns.turn_of_token]
    policy = 1 / len(of_token) * advantage[of_token]
    return Coefficients(policy=policy.to(columns.log_prob.dtype), metrics={"mine/tokens": len(of_token)})
"""
LIBRARY = [
    "recipe=grpo", "recipe.ratio.level=none", "recipe.trust.rule=none", "recipe.advantage.scale=none",
    "recipe.aggregate.mode=token_mean",
]  # fmt: skip


def test_a_hand_written_reinforce_trains_the_weights_that_the_librarys_trains(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "own_algorithm.py"
    file.write_text(FUNCTION)
    settings = quick_settings(tiny_model, f"trainer.steps={STEPS}", f"recipe={file}:reinforce")

    folder = train(settings, tmp_path / "run")

    rows = list(read_rows(folder.metrics))
    assert [row["mine/tokens"] == row["batch/policy_tokens"] for row in rows] == [True] * STEPS
    assert all(row["grad/norm"] > 0 for row in rows)
    assert replay(folder).difference is None
    scored = rescore(folder, [f"{file}:reinforce", "grpo"])
    assert scored.scores[1].mean("cosine") == pytest.approx(1.0)

    file.write_text(FUNCTION + "\n# another\n")
    for refused in (lambda: resumed_settings(folder, [f"trainer.steps={2 * STEPS}"]), lambda: replay(folder)):
        with pytest.raises(UserError, match=r"own_algorithm\.py has changed since the run"):
            refused()
    file.write_text(FUNCTION)
    assert resumed_settings(folder, [f"trainer.steps={2 * STEPS}"]).recipe == settings.recipe

    # the stored batches again, by the library's recipe: the same weights, bit for bit
    shutil.rmtree(folder.path / "recipe")
    folder.config.write_text(to_yaml(quick_settings(tiny_model, f"trainer.steps={STEPS}", *LIBRARY)))
    again = replay(folder)
    assert again.compared > STEPS
    assert again.difference is None


@pytest.mark.nightly
def test_every_rank_runs_the_function(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "own_on_ranks.py"
    file.write_text(FUNCTION)
    settings = quick_settings(tiny_model, "trainer.steps=2", "trainer.ranks=2", f"recipe={file}:reinforce")
    rows = list(read_rows(train(settings, tmp_path / "run").metrics))
    assert [row["mine/tokens"] == row["batch/policy_tokens"] for row in rows] == [True, True]
