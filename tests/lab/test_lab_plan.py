"""What a lab is told becomes cells, and what is wrong is said before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_rl.config.schema import structured
from async_rl.errors import UserError
from async_rl.instruments.lab.plan import LabPlan, LabSettings, load_plan, make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "lab"


def plan(**changes: Any) -> LabPlan:
    base: dict[str, Any] = {
        "run": {"trainer": {"steps": 20}},
        "tasks": {"sort": {}},
        "recipes": {"grpo": {}, "soft": {"name": "tis", "trust": {"cap": 3.0}}},
        "lags": [0, 4],
        "learning_rates": [1e-4, 1e-3],
        "seeds": [0, 1],
    }
    return make_plan(structured(LabSettings, base | changes, where=""))


def test_the_cells_are_every_combination_and_complete_replicate_by_replicate() -> None:
    found = plan()
    assert len(found.cells) == 2 * 2 * 2 * 2
    assert [cell.seed for cell in found.cells] == [0] * 8 + [1] * 8
    settings = found.run_settings(found.cells[-1], Path("somewhere"))
    assert settings.recipe == {"name": "tis", "trust": {"cap": 3.0}}
    assert (settings.staleness.max_staleness, settings.optimizer.learning_rate, settings.seed) == (4, 1e-3, 1)
    assert (settings.model.path, settings.task.name, settings.trainer.steps) == ("somewhere", "sort", 20)


def test_grids_are_united_and_a_cell_in_two_of_them_is_run_once() -> None:
    found = plan(grids=[{"lags": [0], "recipes": ["grpo"]}, {"lags": [0, 2], "seeds": [1]}])
    names = [cell.name for cell in found.cells]
    assert len(names) == len(set(names)) == 4 + 8 - 2
    assert {cell.lag for cell in found.cells} == {0, 2}


def test_settings_of_a_task_are_laid_over_those_of_all(tmp_path: Path) -> None:
    found = plan(
        run={"trainer": {"steps": 20}, "batch": {"groups_per_step": 4, "group_size": 2}},
        tasks={"sort": {}, "long": {"name": "sort", "args": {"length": 9}, "run": {"batch": {"group_size": 6}}}},
    )
    by_task = {cell.task: found.run_settings(cell, tmp_path) for cell in found.cells}
    assert (by_task["sort"].batch.groups_per_step, by_task["sort"].batch.group_size) == (4, 2)
    assert (by_task["long"].batch.groups_per_step, by_task["long"].batch.group_size) == (4, 6)
    assert by_task["long"].task.args == {"length": 9}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipes": {}}, "recipes is empty"),
        ({"tasks": {"sort": {"args": {"lenght": 3}}}}, "did you mean 'task.args.length'"),
        ({"tasks": {"sorting": {}}}, "is not a task; did you mean 'sort'"),
        ({"recipes": {"grpoo": {}}}, "recipes.grpoo: recipe.name 'grpoo' is not a recipe; did you mean"),
        ({"recipes": {"a b": {"name": "grpo"}}}, "a label names files"),
        ({"recipes": {"grpo": 3}}, "recipes.grpo is a group of settings, not 3"),
        ({"lags": [0, 20]}, "every batch comes from the initial model"),
        ({"lags": [-1]}, "lags: -1 is below 0"),
        ({"seeds": []}, "seeds is empty"),
        ({"learning_rates": [5]}, "learning_rates: 5"),
        ({"lags": ["soon"]}, "lags"),
        ({"run": {"staleness": {"max_staleness": 3}}}, "run.staleness: a cell takes batch, generator"),
        ({"run": {"optimizer": {"learning_rate": 1e-3}}}, "would be ignored; set learning_rates"),
        ({"run": {"trainer": {"stepz": 3}}}, "did you mean 'run.trainer.steps'"),
        ({"grids": [{"recipes": ["ppo"]}]}, "grids[0].recipes: 'ppo' is not among recipes"),
        ({"grids": [{"recipe": ["ppo"]}]}, "grids[0].recipe is not a setting; did you mean 'grids[0].recipes'"),
        ({"warm_ups": [1.5]}, "neither a seed (a whole number from 0) nor the folder of a model"),
        ({"cell_timeout_s": 0}, "cell_timeout_s is 0"),
        ({"run": {"batch": {"group_size": 1}}}, "groups of one trajectory makes every advantage 0"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        plan(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["quick", "full"])
def test_the_labs_that_come_with_the_project_are_whole(name: str) -> None:
    found = load_plan(CONFIGS / f"{name}.yaml")
    assert {cell.lag for cell in found.cells} >= {0, 64}
