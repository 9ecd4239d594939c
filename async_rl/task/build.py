"""The tasks by name: the built-in ones, the adapters of other packages, and any class `module:Class` or
`path/file.py:Class` of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from async_rl.config.imports import is_import, load_object
from async_rl.config.schema import structured
from async_rl.errors import UserError, nearest
from async_rl.task.adapters import ADAPTERS, adapter_class
from async_rl.task.arithmetic import Arithmetic
from async_rl.task.calculator import Calculator
from async_rl.task.countdown import Countdown
from async_rl.task.dataset import Dataset
from async_rl.task.guess import Guess
from async_rl.task.letters import Reverse, Sort
from async_rl.task.protocol import Task
from async_rl.task.rehearsed import Rehearsed, RehearsedSettings
from async_rl.task.tools import Tools

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Guess, Sort, Reverse, Arithmetic, Countdown, Calculator, Dataset, Tools, Rehearsed)
}


def task_class(name: str) -> type[Task]:
    """The class of task `name`: a built-in name, `module:Class` or `path/file.py:Class`. Raises UserError."""
    if name in TASKS:
        return TASKS[name]
    if name in ADAPTERS:
        return adapter_class(name)
    if not is_import(name):
        known = [*TASKS, *ADAPTERS]
        raise UserError(f"task.name '{name}' is not a task; {nearest(name, known)} (or module:Class, file.py:Class)")
    where = f"task.name '{name}'"
    found = load_object(name, where=where, what="class")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"{where}: it is {found!r:.60}; a task is a class that derives from async_rl.Task")
    for method in ("problems", "rollout"):
        if getattr(found, method) is getattr(Task, method):
            raise UserError(f"{where}: the class has no method {method}; a task needs problems and rollout")
    if not dataclasses.is_dataclass(found.Settings):
        raise UserError(f"{where}: its Settings is no dataclass; put @dataclass(frozen=True) above it")
    return found


def settings_of(name: str) -> type:
    """The settings dataclass of task `name`. Raises UserError for an unknown one."""
    return task_class(name).Settings


def make_task(name: str, args: Mapping[str, Any]) -> Task:
    """Task `name` with `args` checked. Raises UserError for an unknown task, setting, value or bad data."""
    made = task_class(name)
    if made is Rehearsed:
        return Rehearsed(structured(RehearsedSettings, args, where="task.args"), make_task)
    if name in TASKS or name in ADAPTERS:
        return made(structured(made.Settings, made.complete(args), where="task.args"))
    try:
        task = made(structured(made.Settings, made.complete(args), where="task.args"))
    except UserError:
        raise
    except Exception as error:  # code of others, which may raise anything
        raise UserError(f"task.name '{name}': it cannot be made: {type(error).__name__}: {error}") from error
    task.name = task.name or name
    return task


def has_demonstrations(name: str) -> bool:
    """Can `async-rl init-model` warm a model up with task `name`? Known without its data."""
    return (name in TASKS or name in ADAPTERS or is_import(name)) and task_class(name).has_demonstrations()
