"""Recipes with a critic train end to end on multi-turn episodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_run import quick_settings, train

from async_rl.run.init_model import Shape, WarmupOptions, init_model
from async_rl.run_folder import read_rows
from async_rl.task import make_task

ARGS = {"digits": 1, "num_operands": 2, "max_turns": 3, "max_tokens": 6, "num_train": 512, "num_eval": 16}


@pytest.fixture(scope="module")
def calculator_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warmed up until some episodes succeed: a critic needs returns that differ."""
    path = tmp_path_factory.mktemp("models") / "calculator"
    shape = Shape(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=64)
    options = WarmupOptions(target=0.3, max_steps=600, batch=64, learning_rate=3e-3, check_every=25, seed=0)
    result = init_model(path, make_task("calculator", ARGS), shape, options, print)
    assert result.success >= 0.3
    return path


@pytest.mark.parametrize(
    "recipe", ["st_ppo", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("ppo", "s_ppo", "turn_ppo"))]
)
def test_a_critic_recipe_warms_its_critic_up_and_then_trains_the_policy(
    recipe: str, tmp_path: Path, calculator_model: Path
) -> None:
    settings = quick_settings(
        calculator_model,
        "task=calculator",
        *(f"task.args.{name}={value}" for name, value in ARGS.items()),
        f"recipe={recipe}",
        "batch.groups_per_step=8",
        "critic.kind=model",
        "critic.warmup_steps=1",
        "trainer.steps=3",
        "staleness.max_staleness=2",
    )
    folder = train(settings, tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    assert [row.get("critic/warmup", 0.0) for row in rows] == [1.0, 0.0, 0.0]
    assert all("value/loss" in row and row["critic/grad_norm"] >= 0 for row in rows)
    assert rows[0]["lr/effective"] == 0.0
    assert all(row["lag/max"] <= 2 for row in rows)
    assert (folder.checkpoints / "step_000003" / "critic.safetensors").exists()
