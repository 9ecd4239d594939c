"""What `async-rl tasks` shows: the tasks by name, and one of them with its settings, problems and an episode."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

from async_rl.config.schema import describe
from async_rl.doctor.group_reward import play_group
from async_rl.doctor.problems import NotScripted, ScriptedSession, answers_of, play_scripted
from async_rl.errors import UserError
from async_rl.generator.task_code import describe_error
from async_rl.task import Problem, Task
from async_rl.task.adapters import ADAPTERS, adapter_class
from async_rl.task.build import TASKS
from async_rl.task.rehearsed import Rehearsed
from async_rl.task.weigh import has_group_reward

WIDTH = 100
PROBLEMS = 3
LONGEST = 600
"""characters shown of a text"""


def list_tasks() -> Iterator[str]:
    """Lines: the built-in tasks, then the adapters, each with the sizes it has by default."""
    width = max(map(len, [*TASKS, *ADAPTERS]))
    yield "built in"
    for name, task in TASKS.items():
        if task is not Rehearsed:
            yield f"  {name:<{width}}  {_default_sizes(task):<18}  {_first_line(task)}"
    yield ""
    yield "environments of other packages"
    for name, adapter in ADAPTERS.items():
        there = adapter.version or "installed" if adapter.installed else adapter.install
        yield f"  {name:<{width}}  {_default_sizes(adapter_class(name)):<18}  {adapter.summary}"
        yield f"  {'':<{width}}  {'':<18}  ({adapter.package}: {there})"
    yield ""
    yield "your own: task.name=file.py:Class or module:Class (a class that derives from async_rl.Task)"
    yield "`async-rl tasks NAME` shows one: its settings, three problems and an episode."


def _default_sizes(task: type[Task]) -> str:
    """Problems to train on and held out, as far as the settings alone say."""
    if task.Settings is None or not dataclasses.is_dataclass(task.Settings):
        return ""
    defaults = {f.name: f.default for f in dataclasses.fields(task.Settings)}
    numbers = [defaults.get(name) for name in ("num_train", "num_eval")]
    if not all(isinstance(number, int) for number in numbers):
        with suppress(UserError):
            made = task(task.Settings())
            numbers = [len(made.problems("train")), len(made.problems("eval"))]
    return " / ".join(f"{number:,}" for number in numbers) if None not in numbers else "your data"


def _first_line(task: type[Task]) -> str:
    line = " ".join((inspect.getdoc(task) or "").partition("\n\n")[0].split("\n")).partition(". ")[0].rstrip(".")
    return textwrap.shorten(line, WIDTH, placeholder=" ...")


def show_task(name: str, task: Task) -> Iterator[str]:
    """Lines: what the task is, its settings, its sizes, some problems, and one episode."""
    yield name
    yield textwrap.indent(inspect.getdoc(type(task)) or "(no docstring)", "  ")
    settings = getattr(task, "settings", None)
    if settings is not None and dataclasses.is_dataclass(settings):
        yield "\nsettings"
        for info in describe(settings, "task.args."):
            allowed = info.describe_range()
            yield f"  {info.path} = {_plain(info.value)}" + (f"  [{allowed}]" if allowed else "")
            if info.meaning:
                yield textwrap.fill(info.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    train, held_out = task.problems("train"), task.problems("eval")
    yield f"\nproblems: {len(train):,} to train on, {len(held_out):,} held out"
    for note in task.notes:
        yield f"  note: {note}"
    for index in range(min(PROBLEMS, len(train))):
        yield f"\nproblem {index}"
        yield from show_problem(train[index])
    if len(train):
        yield from show_episode(task, train[0])


def show_problem(problem: Problem) -> Iterator[str]:
    """Its prompt, and what the reward is given."""
    if isinstance(problem.prompt, str):
        yield _indented(problem.prompt)
    else:
        for message in problem.prompt:
            yield _indented(f"<{message['role']}> {message.get('content') or ''}")
    for tool in problem.tools:
        yield _indented(f"tool: {json.dumps(tool, default=str)}")
    for key, value in problem.data.items():
        yield f"    {key}: {_plain(value)}"


@dataclass(slots=True)
class ShownSession(ScriptedSession):
    """A scripted session that keeps what was said, as (who, text)."""

    shown: list[tuple[str, str]] = field(default_factory=list)

    async def generate(self, *, max_tokens: int, agent: str = "", **how: Any) -> str:
        # by its name: `slots=True` makes a new class, in which a bare `super()` fails
        said = (await ScriptedSession.generate(self, max_tokens=max_tokens, agent=agent, **how))[:max_tokens]
        self.shown.append((agent or "policy", said))
        return said

    def append(self, text: str) -> None:
        self.shown.append(("environment", text))

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        self.shown += [(str(message["role"]), str(message.get("content") or "")) for message in messages]

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        self.shown.append(("turn reward", f"{value:g}"))


def show_episode(task: Task, problem: Problem) -> Iterator[str]:
    """One episode of `problem`, played by a script."""
    random = Random(0)
    said = answers_of(task, problem, random, right=True)
    if task.demonstrates:
        whose = "a demonstration of the task"
    else:
        whose = "random letters" if task.right_answer(problem) is None else "the problem's own answer"
    session = ShownSession(said)

    async def play() -> Any:
        await task.setup()
        try:
            return await play_scripted(task, problem, session)
        finally:
            await task.teardown()

    yield f"\nan episode of problem 0, in which {whose} speaks for the policy"
    try:
        reward = asyncio.run(play())
    except NotScripted:
        yield "    it is played by an agent through an endpoint; `async-rl try CONFIG` plays it with a model"
        return
    except Exception as error:  # of the user's code, to be shown
        reward = f"none: it raised {describe_error(error)}"
    for who, text in session.shown:
        yield _indented(f"<{who}> {text}")
    yield f"    reward: {_plain(reward)}"
    for key, value in session.notes.items():
        yield f"    {key}: {_plain(value)}"
    if has_group_reward(task):
        yield from show_group(task, problem)


def show_group(task: Task, problem: Problem) -> Iterator[str]:
    """What the samples of a group get for what they are beside each other."""
    yield "\na group of problem 0, right answers and random ones in turn, and what the group's reward gives each"
    try:
        found = play_group(task, problem, seed=0)
    except Exception as error:  # of the user's code, to be shown
        yield f"    none: it raised {describe_error(error)}"
        return
    for sample, reward in found:
        yield _indented(f"<policy> {sample.completion}")
        yield f"    reward: {_plain(reward)}"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return _short(value) if value else '""'
    return _short(json.dumps(value, default=str, ensure_ascii=False))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"


def _indented(text: str) -> str:
    return textwrap.indent(_short(text.strip("\n")), "    ", lambda line: True)
