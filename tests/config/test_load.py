"""Settings from a file and the command line: a recipe by name is that recipe, a bound implies its depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from async_rl.config import Settings, load_settings, load_with_notes
from async_rl.config.schema import structured, with_overrides
from async_rl.errors import UserError
from async_rl.objective.library import load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"model: {{path: m}}\n{text}")
    return path


def test_names_work_in_yaml_as_on_the_command_line(tmp_path: Path) -> None:
    settings = load_settings(written(tmp_path, "task: guess\nrecipe: grpo\n"))
    assert (settings.task.name, settings.recipe) == ("guess", {"name": "grpo"})
    settings = load_settings(written(tmp_path, "task: guess\nrecipe: grpo\n"), ["recipe.trust.cap=4"])
    assert settings.recipe == {"name": "grpo", "trust": {"cap": 4}}


@pytest.mark.parametrize("word", ["recipe=grpo", "recipe.name=grpo"])
def test_a_recipe_by_name_is_that_recipe(word: str) -> None:
    loaded = load_with_notes(QUICKSTART, [word])
    assert load_recipe(loaded.settings.recipe) == load_recipe({"name": "grpo"})
    [note] = loaded.notes
    assert note.startswith("recipe=grpo is that recipe as it is: what the file changed of grpo is dropped")
    for dropped in ("trust.clip_high=0.28", "aggregate.mode=token_mean", "ess.scale=sqrt"):
        assert dropped in note


def test_axes_beside_a_recipe_by_name_are_added() -> None:
    loaded = load_with_notes(QUICKSTART, ["recipe=vcpo", "recipe.trust.clip_high=0.3"])
    assert loaded.settings.recipe == {"name": "vcpo", "trust": {"clip_high": 0.3}}


def test_axes_alone_are_laid_over_those_of_the_file() -> None:
    loaded = load_with_notes(QUICKSTART, ["recipe.trust.clip_high=0.3"])
    assert loaded.notes == ()
    assert loaded.settings.recipe["trust"] == {"clip_high": 0.3}
    assert loaded.settings.recipe["ess"] == {"scale": "sqrt"}


def test_another_task_drops_what_the_file_says_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "task: {name: guess, args: {num_secrets: 8}}\n")
    assert load_settings(path, ["task=sort"]).task.args == {}
    assert load_settings(path, ["task=guess"]).task.args == {"num_secrets": 8}


def test_a_smaller_bound_sets_the_depth_it_implies() -> None:
    loaded = load_with_notes(QUICKSTART, ["staleness.max_staleness=0"])
    assert loaded.settings.staleness.pipeline_depth == 0
    [note] = loaded.notes
    assert note.startswith("staleness.max_staleness=0 implies staleness.pipeline_depth=1; the file's staleness.pipel")
    assert load_with_notes(QUICKSTART, ["staleness.max_staleness=1"]).notes == ()  # two batches are allowed then


def test_explicit_contradictions_are_refused(tmp_path: Path) -> None:
    words = ["staleness.max_staleness=0", "staleness.pipeline_depth=2"]
    with pytest.raises(UserError, match="it must lie between 1 and 1"):
        load_settings(QUICKSTART, words)
    text = "task: guess\nstaleness: {max_staleness: 0, pipeline_depth: 2}\n"
    with pytest.raises(UserError, match="it must lie between 1 and 1"):
        load_settings(written(tmp_path, text))


WEIGHTS: dict[str, Any] = {
    "task": {"name": "guess", "args": {"num_secrets": 8}, "reward_weights": {"a": 1.5, "b": 2.0}},
}


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], {"a": 1.5, "b": 2.0}),
        (["task.reward_weights.a=null"], {"b": 2.0}),
        (["task.reward_weights.a=null", "task.reward_weights.c=3"], {"b": 2.0, "c": 3.0}),
        (["task.reward_weights=null"], {}),
        (["task.reward_weights={}"], {}),
        (["task.reward_weights={}", "task.reward_weights.c=3"], {"c": 3.0}),
        (["task.reward_weights={c: 3}"], {"a": 1.5, "b": 2.0, "c": 3.0}),
    ],
)
def test_entries_of_a_mapping_can_be_taken_out_on_the_command_line(words: list[str], left: dict[str, float]) -> None:
    made = structured(Settings, with_overrides(WEIGHTS, words), where="")
    assert made.task.reward_weights == left
    assert made.task.args == {"num_secrets": 8}
    assert WEIGHTS["task"]["reward_weights"] == {"a": 1.5, "b": 2.0}, "the given mapping stays"


def test_an_empty_mapping_takes_out_what_the_file_says_and_null_of_a_task_is_its_own() -> None:
    assert structured(Settings, with_overrides(WEIGHTS, ["task.args={}"]), where="").task.args == {}
    of_task = structured(Settings, with_overrides(WEIGHTS, ["task.args.num_secrets=null"]), where="")
    assert of_task.task.args == {"num_secrets": None}
    with pytest.raises(UserError, match="reward_weights"):
        structured(Settings, with_overrides(WEIGHTS, ["task.reward_weights=3"]), where="")
