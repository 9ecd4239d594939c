"""The user's recipe function on one batch: called, its answer checked, measured as every recipe is.

T policy tokens, I trajectories. All columns of a batch and of an answer are [T], on one device, of one dtype.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from async_rl.errors import UserError
from async_rl.objective.measures import (
    Meter,
    effective_sample_size,
    ess_ratio,
    mean_of,
    measure_ess,
    measure_lag,
    measure_outcome,
    measure_ratios,
    measure_selection,
    without_empty_buckets,
)
from async_rl.objective.own import OwnFunction, load_own_function
from async_rl.objective.recipe import Recipe, Requirements, requirements
from async_rl.objective.state import ObjectiveState
from async_rl.objective.tokens import Coefficients, Columns, Tokens, tokens_of
from async_rl.objective.trust import Selection

RESERVED = ("step", "time")
"""names in a metric row that are not the objective's"""
PER_TOKEN = ("policy", "baseline", "entropy", "value_grad", "clipped")
"""the columns of `Coefficients`"""


class RecipeFunction(Protocol):
    """A whole optimizer batch in, one number per policy token out: the number that multiplies grad log pi.

    REINFORCE with the mean reward of the group as its baseline, in `mine.py`, used by `recipe=mine.py:reinforce`:

        import torch
        from async_rl import Coefficients, Columns

        def reinforce(columns: Columns) -> Coefficients:
            group = columns.group_of_trajectory                                    # [trajectories]
            count = torch.bincount(group)                                          # [groups]
            mean = torch.zeros(len(count)).index_add_(0, group, columns.reward) / count
            advantage = columns.reward - mean[group]                               # [trajectories]
            of_token = columns.trajectory_of_turn[columns.turn_of_token]           # [tokens]
            return Coefficients(policy=advantage[of_token] / len(of_token))        # [tokens]

    The function may take `(columns)` or `(columns, recipe, state)`, and answer `Coefficients` or
    `(Coefficients, ObjectiveState)`; `state.numbers` holds what it wants to remember until the next step. `recipe` has
    the axes that the settings give (`recipe.trust.cap=4`), so a function can pass columns of its own on to
    `async_rl.objective.coefficients.coefficients`. Every rank calls the function with the same columns: it must be
    pure, and random choices must come from a generator seeded with `columns.current_version`.

    Trajectories with a value that is not finite are zeros in the columns, and count for nothing. Refused with a
    sentence that names the function: answers of another type, shape or dtype, that are not finite, that carry a
    gradient, or that nothing would use; columns changed in place.
    """

    def __call__(
        self, columns: Columns, recipe: Recipe, state: ObjectiveState, /
    ) -> Coefficients | tuple[Coefficients, ObjectiveState]: ...


def own_coefficients(columns: Columns, recipe: Recipe, state: ObjectiveState) -> tuple[Coefficients, ObjectiveState]:
    """`coefficients`, by the function that `recipe.name` names.

    Raises UserError naming the function when it raises, or answers what cannot be trained on.
    """
    own = load_own_function(recipe.name)
    needs = requirements(recipe)
    tokens = tokens_of(columns, recipe, needs)
    given = _without_broken(columns, tokens)
    versions = {name: column._version for name, column in _tensors(given)}
    answer, after = _answer(own, given, recipe, state)
    for name, column in _tensors(given):
        if column._version != versions[name]:
            raise _refused(own, f"it changed columns.{name} in place, which later updates read too; work on a copy")
    _check(own, answer, given, needs)
    ok = tokens.finite[tokens.trajectory]  # [T] bool
    kept = {name: torch.where(ok, column, 0.0) for name, column in _columns_of(answer)}
    measured, after = _measured(tokens, kept["policy"], recipe, after, known=answer.metrics)
    return replace(
        answer,
        **kept,
        learning_rate_factors={name: float(factor) for name, factor in answer.learning_rate_factors.items()},
        skip=answer.skip or _nothing_left(own, kept),
        metrics=measured | {name: float(value) for name, value in answer.metrics.items()},
    ), after


def _answer(
    own: OwnFunction, columns: Columns, recipe: Recipe, state: ObjectiveState
) -> tuple[Coefficients, ObjectiveState]:
    try:
        answer = own.call(columns, recipe, state)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise _refused(own, f"it raised {type(error).__name__}: {error} ({place})") from error
    after = state
    if isinstance(answer, tuple) and len(answer) == 2:
        answer, after = answer
    if not isinstance(answer, Coefficients):
        raise _refused(own, f"it answered {_kind(answer)}; return async_rl.Coefficients(policy=...)")
    if not isinstance(after, ObjectiveState):
        raise _refused(own, f"the state behind its answer is {_kind(after)}; return an ObjectiveState")
    for name, number in after.numbers.items():
        if not isinstance(number, int | float):
            raise _refused(own, f"state.numbers['{name}'] is {_kind(number)}; a checkpoint holds plain numbers")
    return answer, after


def _check(own: OwnFunction, answer: Coefficients, columns: Columns, needs: Requirements) -> None:
    """Refuse an answer that cannot be trained on, or parts of it that nothing would use."""
    tokens, dtype, device = len(columns.log_prob), columns.log_prob.dtype, columns.log_prob.device
    for name, column in _columns_of(answer):
        if not isinstance(column, Tensor):
            raise _refused(own, f"{name} is {_kind(column)}; it must be a tensor [tokens]")
        if column.shape != (tokens,):
            raise _refused(
                own, f"{name} has the shape {list(column.shape)}; one number a policy token is wanted, [{tokens}]"
            )
        if column.dtype != dtype:
            raise _refused(own, f"{name} is {column.dtype}, the columns are {dtype}; return {name}.to({dtype})")
        if column.device != device:
            raise _refused(own, f"{name} is on {column.device}, the columns are on {device}")
        if column.requires_grad:
            raise _refused(own, f"{name} carries a gradient; coefficients are numbers: return {name}.detach()")
        if not bool(column.isfinite().all()):
            bad = int((~column.isfinite()).sum())
            raise _refused(own, f"{bad} of the {tokens} numbers in {name} are not finite (NaN or infinite)")
    idle = {
        "baseline": (needs.per_trajectory_norms, "recipe.advantage.baseline=opob with recipe.opob.norm=exact"),
        "clipped": (needs.clipping_bias_norm, "recipe.bias.estimator=exact with a recipe.bias.kappa"),
        "value_grad": (needs.value, '@needs_columns("value")'),
    }
    for name, (used, remedy) in idle.items():
        if getattr(answer, name) is not None and not used:
            raise _refused(own, f"{name} would do nothing; leave it out, or ask for what uses it: {remedy}")
    if needs.value and answer.value_grad is None:
        raise _refused(own, "it asks for a critic's value and returns no value_grad, so the critic would never learn")
    for name, factor in answer.learning_rate_factors.items():
        if not (isinstance(factor, int | float) and isfinite(factor) and factor >= 0):
            raise _refused(own, f"learning_rate_factors['{name}'] is {factor!r}; it must be a number, 0 or more")
    for name in answer.metrics:
        if name in RESERVED:
            raise _refused(own, f"a metric cannot be called '{name}'; choose a name like mine/{name}")


def _measured(
    tokens: Tokens, policy: Tensor, recipe: Recipe, state: ObjectiveState, known: Mapping[str, float]
) -> tuple[dict[str, float], ObjectiveState]:
    """The metrics that every recipe has, so that curves, alarms and the summary read alike. policy [T]."""
    meter = Meter()
    if "ess/ratio" not in known:  # else the library has counted this batch already
        ess, state = effective_sample_size(tokens, recipe.ess, state)
        measure_ess(meter, ess)
        readable = tokens.readable[tokens.trajectory]
        log_ratio = torch.where(readable, tokens.log_prob - tokens.log_behaviour, torch.nan)
        meter.put("ess/token", ess_ratio(log_ratio))
    measure_ratios(meter, tokens, None)
    measure_lag(meter, tokens)
    measure_selection(meter, tokens, Selection(keep=tokens.finite, rejected={"nonfinite": ~tokens.finite}))
    ok = tokens.finite[tokens.trajectory]
    measure_outcome(meter, tokens)
    if tokens.entropy is not None:
        meter.put("entropy", mean_of(tokens.entropy, ok))
    meter.put("coefficient/used", mean_of((policy != 0).double(), ok))
    return without_empty_buckets(meter.read()), state


def _without_broken(columns: Columns, tokens: Tokens) -> Columns:
    """`columns` with zeros where a trajectory holds a value that is not finite; the same object where none does."""
    if bool(tokens.finite.all()):
        return columns
    of_token = tokens.finite[tokens.trajectory]  # [T] bool
    of_turn = tokens.finite[columns.trajectory_of_turn]  # [turns] bool
    changes: dict[str, Any] = {
        "reward": torch.where(tokens.finite, columns.reward, 0.0),
        "turn_reward": torch.where(of_turn, columns.turn_reward, 0.0),
    }
    for name, column in _tensors(columns):
        if name not in changes and column.is_floating_point():
            changes[name] = torch.where(of_token.view(-1, *[1] * (column.dim() - 1)), column, 0.0)
    return replace(columns, **changes)


def _nothing_left(own: OwnFunction, kept: dict[str, Tensor]) -> str:
    """Why the step is skipped, or empty: a gradient of zero would still move weights through Adam's moments.

    kept: columns [T] by name.
    """
    if any(bool((kept[name] != 0).any()) for name in ("policy", "baseline", "entropy") if name in kept):
        return ""
    return f"{own.name} gave every policy token the coefficient 0"


def _tensors(columns: Columns) -> Iterator[tuple[str, Tensor]]:
    for field in fields(columns):
        value = getattr(columns, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _columns_of(answer: Coefficients) -> Iterator[tuple[str, Tensor]]:
    for name in PER_TOKEN:
        if (column := getattr(answer, name)) is not None:
            yield name, column


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _refused(own: OwnFunction, why: str) -> UserError:
    return UserError(f"recipe {own.name}: {why}")
