"""Recipes of the user's own: a function `module:function` or `file.py:function`, or a YAML file of axes.

`recipe.name` names it. It is loaded in every process that needs it and recorded in the run's folder (`record`); a run
goes on, is replayed and rescored only while the file is what it was (`check_recorded`). What the function answers on
a batch is checked in own_coefficients.py. This file imports no torch; the user's may.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from async_rl.config.imports import is_import, load_object
from async_rl.config.sources import digest_of
from async_rl.errors import UserError, nearest
from async_rl.run_folder import replace_text

FOLDER = "recipe"
"""in a run's folder: the source file as it was when the run began, and RECORD"""
RECORD = "source.json"
ASKED_FOR = ("log_reference", "log_teacher", "value")
"""columns that cost a forward pass or a critic, so they are computed only for a function that names them"""
NEEDS, NOTED = "_async_rl_needs", "_async_rl_noted"

Function = TypeVar("Function", bound=Callable[..., Any])


def needs_columns(*names: str, noted: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorator of a recipe function: columns that are computed only for recipes that ask.

    Example: `@needs_columns("log_reference")` for a KL to the initial model (one more forward pass), "value" for a
    critic, which learns from `Coefficients.value_grad`. `noted`: names of the task's notes, which come as
    `Columns.noted`; the part `format` of a reward is called "reward/format". Raises UserError for a name that is no
    such column.
    """
    for name in names:
        if name not in ASKED_FOR:
            raise UserError(f"needs_columns: '{name}' is not a column to ask for; {nearest(name, ASKED_FOR)}")

    def mark(function: Function) -> Function:
        setattr(function, NEEDS, frozenset(names))
        setattr(function, NOTED, frozenset(noted))
        return function

    return mark


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFunction:
    """A recipe function that was loaded."""

    name: str
    function: Callable[..., Any]
    takes_settings: bool
    """called with (columns, recipe, state), else with (columns)"""
    needs: frozenset[str]
    """of ASKED_FOR"""
    noted: frozenset[str] = frozenset()
    """names of the task's notes"""

    def call(self, columns: object, recipe: object, state: object) -> Any:
        return self.function(columns, recipe, state) if self.takes_settings else self.function(columns)


def is_own_function(name: str) -> bool:
    """Whether a recipe's name is that of a function: `module:function`, `file.py:function`."""
    return is_import(name)


def is_own_file(name: str) -> bool:
    """Whether a recipe's name is that of a YAML file of axes."""
    return name.endswith((".yaml", ".yml"))


def load_own_function(name: str) -> OwnFunction:
    """Import the function. Raises UserError for one that cannot be imported or takes other arguments."""
    where = f"recipe.name '{name}'"
    function = load_object(name, where=where, what="function")
    if not callable(function):
        raise UserError(f"{where}: it is {function!r:.60}; a recipe is a function of (columns, recipe, state)")
    return OwnFunction(
        name=name,
        function=function,
        takes_settings=_takes_settings(function, where),
        needs=getattr(function, NEEDS, frozenset()),
        noted=getattr(function, NOTED, frozenset()),
    )


def _takes_settings(function: Callable[..., Any], where: str) -> bool:
    signature = inspect.signature(function)
    for takes_settings, arguments in ((True, 3), (False, 1)):
        try:
            signature.bind(*range(arguments))
        except TypeError:
            continue
        return takes_settings
    raise UserError(f"{where}: it takes {signature}; a recipe takes (columns, recipe, state) or (columns) alone")


# A run keeps the source of its recipe.


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSource:
    """The file in which a recipe of the user's own stands."""

    name: str
    """recipe.name"""
    module: str
    """that defines the function; empty for a YAML file"""
    file: str
    digest: str
    """blake2b of the file's bytes, 16 bytes in hex"""


def source_of(name: str) -> RecipeSource | None:
    """Where recipe `name` comes from; None for a recipe of the library. Raises UserError for one without a file."""
    if is_own_file(name):
        return _source(name, "", Path(name).resolve())
    if not is_own_function(name):
        return None
    function = inspect.unwrap(load_own_function(name).function)
    plain = function if inspect.isroutine(function) else type(function)
    try:
        file = inspect.getsourcefile(plain)
    except TypeError:
        file = None
    if file is None:
        raise UserError(f"recipe.name '{name}': its source file is not found; a recipe stands in a file of Python")
    return _source(name, plain.__module__, Path(file).resolve())


def _source(name: str, module: str, file: Path) -> RecipeSource:
    return RecipeSource(name=name, module=module, file=str(file), digest=digest_of(file, f"recipe.name '{name}'"))


def record(run: Path, name: str) -> None:
    """Copy the source file of recipe `name` into the folder of a new run, with its name and digest. Nothing is written
    for a recipe of the library. Raises UserError."""
    source = source_of(name)
    if source is None:
        return
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source.file, folder / Path(source.file).name)
    replace_text(folder / RECORD, json.dumps(asdict(source), indent=1) + "\n")


def recorded(run: Path) -> RecipeSource | None:
    """What `record` wrote; None for a run with a recipe of the library."""
    file = run / FOLDER / RECORD
    return RecipeSource(**json.loads(file.read_text())) if file.is_file() else None


def check_recorded(run: Path, name: str) -> None:
    """Refuse a source file that is not what it was when the run began. Raises UserError."""
    was = recorded(run)
    if was is None:
        return
    now = source_of(name)
    if now is None or now.digest != was.digest:
        copy = run / FOLDER / Path(was.file).name
        raise UserError(
            f"recipe.name '{name}': {was.file} has changed since the run in {run} began; all of a run is trained with "
            f"one recipe. {copy} is the file as it was: put it back, or start a new run with the changed one"
        )
