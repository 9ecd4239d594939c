import dataclasses
import inspect
import subprocess
import sys
from random import Random

import pytest

from async_rl.errors import UserError
from async_rl.task import make_task
from async_rl.task.build import TASKS, settings_of

MADE_UP = sorted(set(TASKS) - {"dataset", "tools", "rehearsed"})


def test_no_file_of_the_room_imports_torch_or_transformers() -> None:
    code = """
import importlib, pkgutil, sys
import async_rl.task
for module in pkgutil.iter_modules(async_rl.task.__path__):
    if module.name != "math_worker":
        importlib.import_module(f"async_rl.task.{module.name}")
print([name for name in ("torch", "transformers", "sympy", "pyarrow", "zmq") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "nearest"), [("gess", "guess"), ("count-down", "countdown"), ("Sort", "sort")])
def test_an_unknown_task_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not a task; did you mean '{nearest}'"):
        make_task(name, {})


def test_an_unknown_task_with_no_near_name_lists_all() -> None:
    with pytest.raises(UserError, match="known: arithmetic, calculator, countdown"):
        make_task("xyzzy", {})


def test_a_misspelt_or_mistyped_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"task\.args\.max_turn is not a setting; did you mean 'task.args.max_turns'"):
        make_task("guess", {"max_turn": 3})
    with pytest.raises(UserError, match=r"task\.args\.max_turns"):
        make_task("guess", {"max_turns": "many"})


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_is_called_by_its_name_and_explains_each_setting(name: str) -> None:
    settings, cls = TASKS[name]
    assert settings_of(name) is settings
    assert cls.name == name
    assert inspect.getdoc(cls)
    for field in dataclasses.fields(settings):
        assert field.metadata["meaning"]


@pytest.mark.parametrize("name", MADE_UP)
def test_every_made_up_task_shows_how_it_is_done(name: str) -> None:
    task = make_task(name, {})
    problem = task.problems("train")[0]
    segments = task.demonstration(problem, Random(1))
    assert segments == task.demonstration(problem, Random(1))
    assert segments[0].text == problem.prompt
    assert not segments[0].policy
    assert any(segment.policy for segment in segments)
    assert all(segment.text for segment in segments)
    assert len(set(task.alphabet)) == len(task.alphabet)  # each becomes one token
    assert set("".join(segment.text for segment in segments)) <= set(task.alphabet)
