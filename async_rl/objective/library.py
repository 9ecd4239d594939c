"""The recipes that come with the package: found, loaded, explained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from async_rl.config import load_yaml, structured
from async_rl.errors import UserError, nearest
from async_rl.objective.effect import check_recipe
from async_rl.objective.recipe import Recipe

FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> dict[str, str]:
    """Name -> its one-line description (first comment line of the file), sorted."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: _comments(path)[0] for name, path in found.items()}


def load_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe `values["name"]` with the other values laid over its file.

    Example: `load_recipe({"name": "vcpo", "ess": {"reference": 0.55}})`.
    Raises UserError for an unknown recipe or setting, a wrong type, or choices that exclude each other.
    """
    return _loaded(json.dumps(values, default=str))


@lru_cache(maxsize=256)  # checking takes 30 ms, and a recipe is frozen
def _loaded(values_json: str) -> Recipe:
    values = json.loads(values_json)
    name = str(values.get("name", ""))
    known = list_recipes()
    if name not in known:
        raise UserError(f"recipe.name '{name}' is not a recipe; {nearest(name, known)}")
    laid = _laid_over(load_yaml(FOLDER / f"{name}.yaml"), values)
    recipe = structured(Recipe, {**laid, "name": name}, where="recipe")
    check_recipe(recipe)
    return recipe


def explain(recipe: Recipe) -> str:
    """Every choice of `recipe`, what it means, and where it comes from: the recipe's file (with its
    comment), a default, or an override."""
    path = FOLDER / f"{recipe.name}.yaml"
    source = load_yaml(path)
    notes = _line_comments(path)
    lines = [recipe.name, *("  " + comment for comment in _comments(path)), ""]
    for section, value in _sections(recipe):
        lines.append(section)
        given = source.get(section, {})
        for name, chosen, meaning, default in value:
            where = given.get(name, default) if isinstance(given, Mapping) else given
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
    assert lines, f"{path.name} must begin with a comment that names its source"
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
