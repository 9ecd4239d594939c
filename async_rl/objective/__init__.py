"""COLUMNS -> COEFFICIENTS. In: the columns of a whole optimizer batch (log-probs, versions, turns, rewards)
and a recipe. Out: for every policy token the detached number that multiplies grad log pi, factors for this
step's learning rate, and metrics. Invariant: coefficients are the gradient of the published surrogate, shown
against float64 autograd in the tests. The entry is `coefficients.coefficients`. Pure: no model, no config
file, no process group; blocks on nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_rl.objective.state import ObjectiveState
    from async_rl.objective.tokens import Coefficients, Columns

__all__ = ["Coefficients", "Columns", "ObjectiveState"]


def __getattr__(name: str) -> Any:
    """Import on use: the launcher and `async-rl recipes` read recipes from here and need no torch."""
    from importlib import import_module

    homes = {"Coefficients": "tokens", "Columns": "tokens", "ObjectiveState": "state"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
