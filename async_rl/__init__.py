"""Asynchronous, off-policy RL for language models with bounded, measured and corrected staleness.

    import async_rl as ar

    run = ar.train("config.yaml", trainer={"steps": 100})
    print(run.summary["reward_eval_last"])

`train`, `evaluate` and `Run` are the ways in; `Task`, `Session` and `Problem` are what an environment of one's own is
made of, `Columns`, `Coefficients` and `RecipeFunction` what an algorithm is made of. What goes wrong through a setting
or a file is a `UserError`, a run that had started and could not go on a `RunFailed`.

Importing the package is quick and loads no torch: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from async_rl.version import __version__

if TYPE_CHECKING:
    from async_rl.api import Evaluation, Rows, Run, evaluate, init_model, train
    from async_rl.config import Settings
    from async_rl.errors import RunFailed, UserError
    from async_rl.objective.own import needs_columns
    from async_rl.objective.own_coefficients import RecipeFunction
    from async_rl.objective.recipe import Recipe
    from async_rl.objective.state import ObjectiveState
    from async_rl.objective.tokens import Coefficients, Columns
    from async_rl.task.protocol import Problem, Sample, Segment, Session, Task
    from async_rl.trajectory import Trajectory, Turn

__all__ = [
    "Coefficients",
    "Columns",
    "Evaluation",
    "ObjectiveState",
    "Problem",
    "Recipe",
    "RecipeFunction",
    "Rows",
    "Run",
    "RunFailed",
    "Sample",
    "Segment",
    "Session",
    "Settings",
    "Task",
    "Trajectory",
    "Turn",
    "UserError",
    "__version__",
    "evaluate",
    "init_model",
    "needs_columns",
    "train",
]

_HOMES = {
    "Coefficients": "objective.tokens",
    "Columns": "objective.tokens",
    "Evaluation": "api",
    "ObjectiveState": "objective.state",
    "Problem": "task.protocol",
    "Recipe": "objective.recipe",
    "RecipeFunction": "objective.own_coefficients",
    "Rows": "api",
    "Run": "api",
    "RunFailed": "errors",
    "Sample": "task.protocol",
    "Segment": "task.protocol",
    "Session": "task.protocol",
    "Settings": "config",
    "Task": "task.protocol",
    "Trajectory": "trajectory",
    "Turn": "trajectory",
    "UserError": "errors",
    "evaluate": "api",
    "init_model": "api",
    "needs_columns": "objective.own",
    "train": "api",
}
"""public name -> the module that defines it"""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
