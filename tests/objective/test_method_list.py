"""The list of published methods tells of recipes that exist, and misses none."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml

from async_rl.objective.library import list_recipes, load_recipe
from async_rl.objective.methods import FILE, Method, counts, describe_methods, list_methods
from async_rl.objective.recipe import requirements

OUR_OWN = {"ess_grpo", "vcpo_turn", "vcpo_token"}


def test_every_recipe_belongs_to_a_method_and_every_method_names_recipes_that_exist() -> None:
    named = {name for method in list_methods() for name in method.recipes}
    assert named | OUR_OWN == set(list_recipes())


def test_what_works_has_a_recipe_and_what_does_not_says_what_is_missing() -> None:
    for method in list_methods():
        if method.state == "works":
            assert method.recipes, method.name
            assert method.here, method.name
        else:
            assert method.missing, method.name


def test_the_file_has_no_other_fields_and_no_method_twice() -> None:
    known = {field.name for field in fields(Method)}
    assert all(set(row) <= known for row in yaml.safe_load(FILE.read_text()))
    names = [method.name for method in list_methods()]
    assert len(set(names)) == len(names)


def test_the_counts_are_those_of_the_list() -> None:
    core = [method for method in list_methods() if method.tier == "core"]
    works = sum(method.state == "works" for method in core)
    assert counts()["core"].startswith(f"{works} of {len(core)} work")
    assert any(line.startswith("part ") and "VADE" in line and "not here: " in line for line in describe_methods())


# What is called "works" is proved: coefficients against the published form, a row of what came out, a replayed run.

TESTS = Path(__file__).parents[1]
WORKS = sorted({name for method in list_methods() if method.state == "works" for name in method.recipes})


def texts(folder: Path, *patterns: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for pattern in patterns for path in sorted(folder.glob(pattern)))


def named(recipe: str, text: str) -> bool:
    """As a word of its own: a string, an argument, a cell of a table."""
    return re.search(rf"(?<![\w.]){recipe}(?![\w.])", text) is not None


def test_what_works_has_its_coefficients_tested() -> None:
    written = texts(TESTS, "objective/*.py", "foreign/*.py", "trainer/test_updates.py", "support_methods.py")
    assert [name for name in WORKS if not re.search(rf"""["'=]{name}["' ]""", written)] == []


def test_what_works_has_a_row_of_what_came_out() -> None:
    tables = texts(TESTS.parent, "bench/METHODS.md", "bench/LAB.md")
    rows = "\n".join(line for line in tables.splitlines() if line.startswith("|"))
    assert [name for name in WORKS if not named(name, rows)] == []


def test_all_that_works_needs_is_in_runs_that_are_replayed() -> None:
    """What a recipe needs beside rewards and log-probs (a reference, a critic's values, a teacher, ...) is made by the
    trainer, not by the objective: each need is in a run of processes that is replayed bit for bit."""
    written = texts(TESTS, "run/*.py")
    replayed = {need for name in list_recipes() if named(name, written) for need in needs(name)}
    assert {name: needs(name) - replayed for name in WORKS if needs(name) - replayed} == {}


def needs(name: str) -> set[str]:
    need = requirements(load_recipe({"name": name}))
    return {field.name for field in fields(need) if getattr(need, field.name)}
