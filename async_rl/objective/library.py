"""The recipes by name: those of the library (recipes/*.yaml), and the user's own (own.py). Loaded and explained."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from async_rl.config.schema import load_yaml, structured
from async_rl.errors import UserError, nearest
from async_rl.objective.axes import KlSettings
from async_rl.objective.conflicts import check_recipe
from async_rl.objective.own import is_own_file, is_own_function, load_own_function, source_of
from async_rl.objective.recipe import Controller, Recipe, Schedule

FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> dict[str, str]:
    """Name -> its one-line description (first comment line of the file), sorted."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: _comments(path)[0] for name, path in found.items()}


def load_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe `values["name"]` with the other values laid over it.

    The name is one of `list_recipes()`, a YAML file of axes (`mine.yaml`), or a function of the user's own
    (`mine.py:reinforce`, `package.module:reinforce`; see own_coefficients.RecipeFunction), for which the axes have
    their defaults.

    Example: `load_recipe({"name": "vcpo", "ess": {"reference": 0.55}})`.
    Raises UserError for an unknown recipe or setting, a wrong type, choices that exclude each other, or a function
    that cannot be imported.
    """
    name = str(values.get("name", ""))
    if is_own_function(name):
        return _own(name, values)
    if is_own_file(name):
        return _laid_over_file(Path(name), values)
    return _of_library(json.dumps(values, default=str))


@lru_cache(maxsize=256)  # checking takes 30 ms, and a recipe is frozen
def _of_library(values_json: str) -> Recipe:
    values = json.loads(values_json)
    name = str(values.get("name", ""))
    known = list_recipes()
    if name not in known:
        raise UserError(
            f"recipe.name '{name}' is not a recipe; {nearest(name, known)} (or file.py:function, module:function, "
            "file.yaml)"
        )
    return _laid_over_file(FOLDER / f"{name}.yaml", values)


def _laid_over_file(path: Path, values: Mapping[str, Any]) -> Recipe:
    laid = _laid_over(load_yaml(path), values)
    recipe = _structured({**laid, "name": str(values["name"])})
    check_recipe(recipe)
    return recipe


def _structured(values: Mapping[str, Any]) -> Recipe:
    """The recipe of these values. Raises UserError."""
    lists = _lists(values)
    recipe = structured(Recipe, {k: v for k, v in values.items() if k not in lists}, where="recipe")
    return dataclasses.replace(recipe, **lists)


def _lists(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of its settings that are lists of settings. Raises UserError."""
    lists: dict[str, Any] = {}
    for name, kind in (("more_kl", KlSettings), ("schedule", Schedule), ("controller", Controller)):
        given = values.get(name, ())
        if not isinstance(given, list | tuple) or not all(isinstance(one, Mapping) for one in given):
            raise UserError(f"recipe.{name} is {given!r:.80}; it must be a list of settings, each name: value")
        lists[name] = tuple(structured(kind, one, where=f"recipe.{name}[{i}]") for i, one in enumerate(given))
    return lists


def _own(name: str, values: Mapping[str, Any]) -> Recipe:
    own = load_own_function(name)
    axes = [axis for axis in values if axis != "name"]
    if axes and not own.takes_settings:
        raise UserError(
            f"recipe {name}: recipe.{axes[0]} would do nothing, since the function takes the columns alone; leave it "
            "out, or let the function take (columns, recipe, state)"
        )
    recipe = _structured(values)
    if axes:
        check_recipe(recipe)
    return recipe


def explain(recipe: Recipe) -> str:
    """Every choice of `recipe`, what it means, and where it comes from: the recipe's file (with its comment), a
    default, or an override. Of a function of the user's own its docstring and its file."""
    lines = [recipe.name]
    source: Mapping[str, Any] = {}
    notes: Mapping[str, str] = {}
    if is_own_function(recipe.name):
        own, stands = load_own_function(recipe.name), source_of(recipe.name)
        assert stands is not None
        lines += [
            f"  {line}" for line in (inspect.getdoc(own.function) or "a function without a docstring").split("\n")
        ]
        lines += [f"  {stands.file} (blake2b {stands.digest})", ""]
        if not own.takes_settings:
            return "\n".join(lines) + "\n"
    else:
        path = Path(recipe.name) if is_own_file(recipe.name) else FOLDER / f"{recipe.name}.yaml"
        source, notes = load_yaml(path), _line_comments(path)
        lines += [*("  " + comment for comment in _comments(path)), ""]
    for section, value in _sections(recipe):
        lines.append(section)
        given = source.get(section, {})
        for name, chosen, meaning, default in value:
            where = given.get(name, default) if isinstance(given, Mapping) else given
            if isinstance(chosen, tuple) and section in source:
                where = _lists(source)[section]
            if chosen != where:
                origin = f"override (recipe: {where})"
            elif (isinstance(given, Mapping) and name in given) or (section == name and section in source):
                note = notes.get(f"{section}.{name}" if section != name else name, "")
                origin = f"recipe{': ' + note if note else ''}"
            else:
                origin = "default"
            lines.append(f"  {name} = {chosen}  [{origin}]")
            lines.append(f"      {meaning}")
    return "\n".join(lines) + "\n"


def _sections(recipe: Recipe) -> list[tuple[str, list[tuple[str, Any, str, Any]]]]:
    """(section, [(setting, value, meaning, default)]) in the order of the dataclass."""
    sections = []
    plain = Recipe()
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        default = getattr(plain, field.name)
        if field.name == "name":
            continue
        if not dataclasses.is_dataclass(value):
            sections.append((field.name, [(field.name, value, field.metadata["meaning"], default)]))
            continue
        rows = [
            (f.name, getattr(value, f.name), f.metadata["meaning"], getattr(default, f.name))
            for f in dataclasses.fields(value)
        ]
        sections.append((field.name, rows))
    return sections


def _laid_over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in values.items():
        below = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[name] = _laid_over(below, value) if both and isinstance(below, Mapping) else value
    return merged


def _comments(path: Path) -> list[str]:
    """The comment lines at the top of the file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    assert lines or path.parent != FOLDER, f"{path.name} must begin with a comment that names its source"
    return lines


def _line_comments(path: Path) -> dict[str, str]:
    """ "section.setting" -> the comment behind it."""
    notes, section = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("#")
        name, colon, _ = code.strip().partition(":")
        if not colon:
            continue
        indented = code.startswith(" ")
        if not indented:
            section = name
        if comment:
            notes[f"{section}.{name}" if indented else name] = comment.strip()
    return notes
