"""Recipes of the user's own: found by name, checked on every batch, recorded with the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from async_rl.config.load import make_settings
from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients, objective_of
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import explain, load_recipe
from async_rl.objective.own import check_recorded, needs_columns, record, recorded
from async_rl.objective.recipe import requirements

REINFORCE = '''
import torch
from async_rl import Coefficients, Columns


def reinforce(columns: Columns) -> Coefficients:
    """REINFORCE with the mean reward of the group as its baseline."""
    group = columns.group_of_trajectory
    count = torch.bincount(group)
    mean = torch.zeros(len(count), dtype=columns.reward.dtype).index_add_(0, group, columns.reward) / count
    advantage = columns.reward - mean[group]
    of_token = columns.trajectory_of_turn[columns.turn_of_token]
    return Coefficients(policy=1 / len(of_token) * advantage[of_token])
'''
LIBRARY_REINFORCE: dict[str, Any] = {
    "name": "grpo",
    "ratio": {"level": "none"},
    "trust": {"rule": "none"},
    "advantage": {"scale": "none"},
    "aggregate": {"mode": "token_mean"},
}
SETUP: dict[str, Any] = {
    "group_size": 1,
    "updates_per_batch": 1,
    "max_staleness": 4,
    "has_critic": False,
    "single_turn": False,
}
SETTINGS: dict[str, Any] = {"model": {"path": "model"}, "task": "guess"}
MakeColumns = Callable[..., Columns]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """A function's body -> the name of the recipe; the function is called `mine`."""

    def made(body: str, arguments: str = "columns") -> str:
        file = tmp_path / "mine.py"
        indented = "\n".join("    " + line for line in body.strip().splitlines())
        file.write_text(
            "import torch\nfrom async_rl import Coefficients, needs_columns\n"
            "from async_rl.objective.coefficients import coefficients\n"
            f"def mine({arguments}):\n{indented}\n"
        )
        return f"{file}:mine"

    return made


def answer(name: str, columns: Columns, **axes: Any) -> tuple[Any, ObjectiveState]:
    recipe = load_recipe({"name": name, **axes})
    return objective_of(recipe)(columns, recipe, ObjectiveState())


def test_a_hand_written_reinforce_gives_the_librarys_coefficients(tmp_path: Path, make_columns: MakeColumns) -> None:
    (tmp_path / "own.py").write_text(REINFORCE)
    for seed in range(5):
        columns = make_columns(seed, empty=False)
        got, state = answer(f"{tmp_path / 'own.py'}:reinforce", columns)
        want, _ = coefficients(columns, load_recipe(LIBRARY_REINFORCE), ObjectiveState())
        torch.testing.assert_close(got.policy, want.policy, rtol=1e-12, atol=1e-15)
        shared = set(got.metrics) & set(want.metrics) - {"ess/reference"}
        assert {"lag/mean", "lag/max", "ess/ratio", "kl/behaviour", "is/ratio_max", "entropy"} <= shared
        assert {name: got.metrics[name] for name in shared} == pytest.approx({n: want.metrics[n] for n in shared})
        assert state.fresh


def test_the_function_may_use_the_library_its_axes_and_a_memory(
    write: Callable[..., str], make_columns: MakeColumns
) -> None:
    name = write(
        "from dataclasses import replace\n"
        "found, after = coefficients(columns, recipe, state)\n"
        'seen = state.numbers.get("seen", 0) + 1\n'
        "return replace(found, policy=2 * found.policy), replace(after, numbers={'seen': seen})",
        "columns, recipe, state",
    )
    columns = make_columns(0)
    got, state = answer(name, columns, trust={"clip_high": 0.3})
    want, after = coefficients(columns, load_recipe({"name": "grpo", "trust": {"clip_high": 0.3}}), ObjectiveState())
    torch.testing.assert_close(got.policy, 2 * want.policy, rtol=0, atol=0)
    assert state == replace(after, numbers={"seen": 1})
    assert ObjectiveState.from_dict(state.to_dict()) == state


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return columns.reward", "it answered a Tensor; return async_rl.Coefficients"),
        ("return None", "it answered None"),
        ("return Coefficients(policy=columns.reward)", "one number a policy token is wanted"),
        ("return Coefficients(policy=columns.log_prob[:, None])", "policy has the shape"),
        ("return Coefficients(policy=columns.log_prob.float())", "policy is torch.float32, the columns are torch.fl"),
        ("return Coefficients(policy=columns.log_prob / 0)", "numbers in policy are not finite"),
        ("return Coefficients(policy=columns.log_prob.tolist())", "policy is a list"),
        ("return Coefficients(policy=columns.log_prob.clone().requires_grad_())", "policy carries a gradient"),
        (
            "p = columns.log_prob\nreturn Coefficients(policy=p, entropy=p * torch.nan)",
            "numbers in entropy are not fin",
        ),
        ("p = columns.log_prob\nreturn Coefficients(policy=p, baseline=p)", "baseline would do nothing"),
        ("p = columns.log_prob\nreturn Coefficients(policy=p, value_grad=p)", "value_grad would do nothing"),
        ("p = columns.log_prob\nreturn Coefficients(policy=p, clipped=p)", "clipped would do nothing"),
        (
            "return Coefficients(policy=columns.log_prob, learning_rate_factors={'mine': torch.inf})",
            "learning_rate_factors\\['mine'\\] is inf",
        ),
        ("return Coefficients(policy=columns.log_prob, metrics={'step': 1.0})", "a metric cannot be called 'step'"),
        (
            "columns.reward.sub_(1.0)\nreturn Coefficients(policy=columns.log_prob)",
            "it changed columns.reward in place",
        ),
        ("return Coefficients(policy=columns.advantage)", "it raised AttributeError.*\\(mine.py, line 5\\)"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_refused_by_the_functions_name(
    body: str, message: str, write: Callable[..., str], make_columns: MakeColumns
) -> None:
    name = write(body)
    with pytest.raises(UserError, match=message) as caught:
        answer(name, make_columns(0))
    assert str(caught.value).startswith(f"recipe {name}: ")


def test_broken_trajectories_are_zeros_for_the_function_and_count_for_nothing(
    write: Callable[..., str], make_columns: MakeColumns
) -> None:
    name = write("return Coefficients(policy=columns.log_prob - columns.log_behaviour + 1)")
    columns = make_columns(0, empty=False)
    log_behaviour = columns.log_behaviour.clone()
    log_behaviour[0] = torch.nan
    got, _ = answer(name, replace(columns, log_behaviour=log_behaviour))
    broken = columns.trajectory_of_turn[columns.turn_of_token] == 0
    assert (got.policy[broken] == 0).all()
    assert (got.policy[~broken] == (columns.log_prob - columns.log_behaviour + 1)[~broken]).all()
    assert got.metrics["reject/nonfinite/trajectories"] == 1


def test_a_batch_without_a_coefficient_is_skipped(write: Callable[..., str], make_columns: MakeColumns) -> None:
    name = write("return Coefficients(policy=0 * columns.log_prob)")
    got, _ = answer(name, make_columns(0))
    assert got.skip == f"{name} gave every policy token the coefficient 0"


def test_columns_that_cost_something_are_computed_for_functions_that_ask(tmp_path: Path) -> None:
    file = tmp_path / "asks.py"
    file.write_text(
        "from async_rl import needs_columns\n"
        '@needs_columns("log_reference", "value")\n'
        "def both(columns): ...\n"
        "def none(columns): ...\n"
    )
    asks, plain = (requirements(load_recipe({"name": f"{file}:{name}"})) for name in ("both", "none"))
    assert asks.reference
    assert asks.value
    assert not any(getattr(plain, name) for name in plain.__slots__)
    with pytest.raises(UserError, match="'log_refrence' is not a column to ask for; did you mean 'log_reference'"):
        needs_columns("log_refrence")


@pytest.mark.parametrize(
    ("code", "axes", "message"),
    [
        ("def other(columns): ...", {}, "has no function 'mine'; did you mean|has no function 'mine'"),
        ("mine = 3", {}, "it is 3; a recipe is a function"),
        ("def mine(): ...", {}, r"it takes \(\); a recipe takes \(columns, recipe, state\) or \(columns\) alone"),
        ("def mine(columns): ...", {"trust": {"cap": 4.0}}, "recipe.trust would do nothing"),
        ("def mine(columns, recipe, state): ...", {"trust": {"cpa": 4.0}}, "did you mean 'recipe.trust.cap'"),
        ("import torch_is_not_spelt_so", {}, "cannot import"),
    ],
)
def test_functions_that_cannot_be_a_recipe_are_refused(
    code: str, axes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(code + "\n")
    with pytest.raises(UserError, match=message):
        load_recipe({"name": f"{tmp_path / 'bad.py'}:mine", **axes})


def test_checks_of_the_librarys_axes_do_not_judge_a_function(write: Callable[..., str]) -> None:
    assert check_effect(load_recipe({"name": write("return None")}), **SETUP) == []


def test_files_are_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text(REINFORCE)
    (tmp_path / "near.yaml").write_text("# my recipe\ntrust:\n  rule: truncate\n  cap: 3.0  # mine\n")
    function = make_settings(SETTINGS | {"recipe": "near.py:reinforce"}, folder=tmp_path).settings.recipe
    assert function == {"name": f"{tmp_path}/near.py:reinforce"}
    data = make_settings(SETTINGS, ["recipe=near.yaml", "recipe.ess.scale=sqrt"], folder=tmp_path).settings.recipe
    recipe = load_recipe(data)
    assert (recipe.name, recipe.trust.rule, recipe.trust.cap) == (f"{tmp_path}/near.yaml", "truncate", 3.0)
    assert recipe.ess.scale == "sqrt"
    assert "cap = 3.0  [recipe: mine]" in explain(recipe)
    assert "REINFORCE with the mean reward" in explain(load_recipe(function))


@pytest.mark.parametrize("ending", ["py", "yaml"])
def test_the_source_is_kept_with_the_run_and_a_changed_one_is_refused(ending: str, tmp_path: Path) -> None:
    file, run = tmp_path / f"kept.{ending}", tmp_path / "run"
    run.mkdir()
    file.write_text(REINFORCE if ending == "py" else "# mine\nentropy: 0.1\n")
    name = f"{file}:reinforce" if ending == "py" else str(file)
    record(run, name)
    kept = recorded(run)
    assert kept is not None
    assert (kept.name, kept.file) == (name, str(file))
    assert (run / "recipe" / file.name).read_text() == file.read_text()
    check_recorded(run, name)
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=f"recipe.name '{name}': .*has changed since the run"):
        check_recorded(run, name)


def test_nothing_is_kept_of_a_recipe_of_the_library(tmp_path: Path) -> None:
    record(tmp_path, "grpo")
    assert list(tmp_path.iterdir()) == []
    check_recorded(tmp_path, "grpo")
