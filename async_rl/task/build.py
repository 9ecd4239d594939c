"""The tasks by name: the one place to add one to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from async_rl.config.schema import structured
from async_rl.errors import UserError, nearest
from async_rl.task.arithmetic import Arithmetic, ArithmeticSettings
from async_rl.task.calculator import Calculator, CalculatorSettings
from async_rl.task.countdown import Countdown, CountdownSettings
from async_rl.task.dataset import Dataset, DatasetSettings
from async_rl.task.guess import Guess, GuessSettings
from async_rl.task.letters import LettersSettings, Reverse, Sort
from async_rl.task.protocol import Task
from async_rl.task.rehearsed import Rehearsed, RehearsedSettings
from async_rl.task.tools import Tools, ToolsSettings

TASKS: dict[str, tuple[type, Callable[..., Task]]] = {
    "guess": (GuessSettings, Guess),
    "sort": (LettersSettings, Sort),
    "reverse": (LettersSettings, Reverse),
    "arithmetic": (ArithmeticSettings, Arithmetic),
    "countdown": (CountdownSettings, Countdown),
    "calculator": (CalculatorSettings, Calculator),
    "dataset": (DatasetSettings, Dataset),
    "tools": (ToolsSettings, Tools),
    "rehearsed": (RehearsedSettings, Rehearsed),
}
"""name -> (dataclass of its settings, task made from them)"""


def settings_of(name: str) -> type:
    """The settings dataclass of task `name`. Raises UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"task.name '{name}' is not a task; {nearest(name, TASKS)}")
    return TASKS[name][0]


def make_task(name: str, args: Mapping[str, Any]) -> Task:
    """Task `name` with `args` checked. Raises UserError for an unknown task, setting, value or bad data."""
    settings: Any = structured(settings_of(name), args, where="task.args")
    if name == Rehearsed.name:
        return Rehearsed(settings, make_task)
    return TASKS[name][1](settings)


def has_demonstrations(name: str) -> bool:
    """Can `async-rl init-model` warm a model up with task `name`? Known without its data."""
    return name in TASKS and hasattr(TASKS[name][1], "demonstration")
