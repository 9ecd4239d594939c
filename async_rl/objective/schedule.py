"""Numbers of a recipe that move with the step (docs/algorithms.md#schedules). A function of the step alone, so a run
that is resumed or replayed has the same numbers."""

from __future__ import annotations

import dataclasses
from math import cos, pi
from typing import Any

from async_rl.objective.recipe import Recipe, Schedule


def value_at(moves: Schedule, step: int) -> float:
    """Its number in training step `step` (0-based)."""
    if step < moves.since:
        return moves.start
    if step >= moves.until:
        return moves.end
    done = (step - moves.since) / (moves.until - moves.since)
    match moves.course:
        case "jump":
            share = 0.0
        case "linear":
            share = done
        case "cosine":
            share = 0.5 * (1 - cos(pi * done))
    return moves.start + share * (moves.end - moves.start)


def recipe_at(recipe: Recipe, step: int) -> Recipe:
    """`recipe` with the numbers that it has in this step."""
    for moves in recipe.schedule:
        recipe = _with(recipe, moves.number, value_at(moves, step))
    return recipe


def _with(recipe: Recipe, path: str, value: float) -> Recipe:
    section, _, name = path.rpartition(".")
    changed: dict[str, Any] = {name: value}
    if section:
        changed = {section: dataclasses.replace(getattr(recipe, section), **changed)}
    return dataclasses.replace(recipe, **changed)


def scheduled(recipe: Recipe, path: str) -> Any:
    """What `recipe` holds at a path like kl.coefficient; None where there is no such setting."""
    found: Any = recipe
    for name in path.split("."):
        if not dataclasses.is_dataclass(found) or name not in [f.name for f in dataclasses.fields(found)]:
            return None
        found = getattr(found, name)
    return found
