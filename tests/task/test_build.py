import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from support_session import ScriptedSession, play

from async_rl.errors import UserError
from async_rl.task import has_demonstrations, make_task
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
    cls = TASKS[name]
    settings = cls.Settings
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


# ---------------------------------------------------------------- tasks of one's own

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from async_rl.errors import UserError
from async_rl.task import Problem, Task

class Bare(Task):
    def problems(self, split):
        return [Problem(index=0, prompt="a")]
    async def rollout(self, problem, session):
        return float(await session.generate(max_tokens=1) == "b")

class Echo(Bare):
    single_turn = True
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        words: int = 3
        spoken: bool = False
    def problems(self, split):
        return [Problem(index=i, prompt=f"say {i}:") for i in range(self.settings.words)]

class Named(Bare):
    name = "a name of its own"

class NoRollout(Task):
    def problems(self, split): return []

class LooseSettings(Bare):
    class Settings:
        words = 3

class Raises(Bare):
    def __init__(self, settings): raise OSError("the disk is gone")

class Refuses(Bare):
    def __init__(self, settings): raise UserError("task.args.words is odd; make it even")

class NotATask: pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """The file of a user's tasks."""
    (tmp_path / "own_tasks_for_test.py").write_text(OWN)
    return f"{tmp_path}/own_tasks_for_test.py"


def test_a_task_of_ones_own_needs_problems_and_a_rollout_only(own: str) -> None:
    task = make_task(f"{own}:Bare", {})
    assert task.name == f"{own}:Bare"
    assert play(task, task.problems("train")[0], ScriptedSession(["b"])) == 1.0
    assert not task.single_turn
    assert not has_demonstrations(f"{own}:Bare")
    with pytest.raises(UserError, match=r"task\.args\.words is not a setting; none is known here"):
        make_task(f"{own}:Bare", {"words": 3})


def test_the_settings_of_a_task_of_ones_own_are_checked(own: str) -> None:
    task = make_task(f"{own}:Echo", {"words": 5})
    assert len(task.problems("train")) == task.settings.words == 5
    assert task.single_turn
    assert settings_of(f"{own}:Echo") is type(task.settings)
    assert make_task(f"{own}:Named", {}).name == "a name of its own"
    with pytest.raises(UserError, match=r"task\.args\.word is not a setting; did you mean 'task.args.words'"):
        make_task(f"{own}:Echo", {"word": 3})
    with pytest.raises(UserError, match=r"task\.args\.words is 'many'; it must be a whole number"):
        make_task(f"{own}:Echo", {"words": "many"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NotATask", "a task is a class that derives from async_rl.Task"),
        ("OWN", "has no class 'OWN'"),
        ("Problem", "derives from async_rl.Task"),
        ("NoRollout", "the class has no method rollout"),
        ("LooseSettings", "its Settings is no dataclass"),
        ("Raises", "it cannot be made: OSError: the disk is gone"),
        ("Refuses", "task.args.words is odd; make it even"),
    ],
)
def test_a_task_of_ones_own_that_cannot_be_made_is_named_with_the_reason(own: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(f"{own}:{name}", {})


def test_a_task_of_ones_own_can_be_rehearsed(own: str) -> None:
    task = make_task("rehearsed", {"name": f"{own}:Echo", "args": {"words": 2}})
    assert len(task.problems("train")) == 2
    assert task.single_turn


def test_built_in_tasks_say_whether_an_episode_is_one_turn() -> None:
    one = {name for name, task in TASKS.items() if task.single_turn}
    assert one == {"sort", "reverse", "arithmetic", "countdown", "dataset"}
