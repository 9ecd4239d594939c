"""Numbers of a recipe that move (docs/algorithms.md#schedules): with the step (`Schedule`), or after what was measured
(`Controller`). The first are a function of the step alone, the second of the state, which is part of the checkpoint: so
a run that is resumed or replayed has the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import ceil, cos, exp, expm1, isfinite, pi
from typing import Any

from async_rl.objective.recipe import Controller, Recipe, Schedule
from async_rl.objective.state import Controlled, ObjectiveState


def value_at(moves: Schedule, step: int) -> float:
    """Its number in training step `step` (0-based)."""
    if step < moves.since:
        return moves.start
    if moves.every:
        step = moves.since + ceil((step - moves.since) / moves.every) * moves.every
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
        case "exponential":
            share = expm1(-moves.rate * done) / expm1(-moves.rate)
    return moves.start + share * (moves.end - moves.start)


def recipe_at(recipe: Recipe, step: int, state: ObjectiveState) -> Recipe:
    """`recipe` with the numbers that it has in this step, in this state."""
    for moves in recipe.schedule:
        recipe = _with(recipe, moves.number, value_at(moves, step))
    for controller in recipe.controller:
        if controller.number in state.controlled:
            recipe = _with(recipe, controller.number, state.controlled[controller.number].value)
    return recipe


def controlled(recipe: Recipe, state: ObjectiveState, measured: Mapping[str, float]) -> ObjectiveState:
    """The state after an update with these metrics. `recipe`: with the numbers that it had in the update.

    A metric that the update has not, or that is no number, moves nothing.
    """
    after = dict(state.controlled)
    for controller in recipe.controller:
        metric = measured.get(controller.metric)
        if metric is not None and isfinite(metric):
            now = after.get(controller.number) or Controlled(value=float(scheduled(recipe, controller.number)))
            after[controller.number] = _moved(controller, now, metric)
    return dataclasses.replace(state, controlled=after)


def _moved(controller: Controller, now: Controlled, metric: float) -> Controlled:
    """Where the number of `controller` goes from `now`."""
    if controller.law == "switch":
        passed = metric > controller.target if controller.side == "above" else metric < controller.target
        count = now.passed + 1 if passed or now.passed >= controller.hold else 0
        return Controlled(value=controller.then if count >= controller.hold else now.value, passed=count)
    error = metric - controller.target
    if controller.law == "step":
        held = (now.value if now.held is None else now.held) + (controller.rate if error <= 0 else -controller.rate)
        held = max(controller.low, min(controller.high, held))
        return Controlled(value=held if error <= 0 else 0.0, held=held)
    if controller.law == "add":
        value = now.value + controller.rate * error
    else:
        value = now.value * exp(controller.rate * max(-1.0, min(1.0, error / abs(controller.target))))
    return Controlled(value=max(controller.low, min(controller.high, value)))


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
