"""The list of published methods tells of recipes that exist, and misses none."""

from __future__ import annotations

from dataclasses import fields

import yaml

from async_rl.objective.library import list_recipes
from async_rl.objective.methods import FILE, Method, counts, describe_methods, list_methods

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
