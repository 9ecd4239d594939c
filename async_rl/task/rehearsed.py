"""Another task with short turns and rewards by the toss of a coin: what a model that can do nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from inspect import isawaitable
from typing import Any

from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.generated import require_range, stable_hash
from async_rl.task.protocol import (
    Connection,
    FitPrompts,
    Measure,
    Problem,
    Reward,
    Sample,
    Score,
    Session,
    Task,
    Utterance,
)
from async_rl.trajectory import Split

CALLS = 2
"""turns that a call is put behind"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedSettings:
    """Example: `task: {name: rehearsed, args: {name: calculator, args: {digits: 3}}}`; `--fake-model` writes it."""

    name: str = setting("", "the task that is rehearsed")
    args: dict[str, Any] = setting({}, "its settings")
    max_tokens: int = setting(16, "longest turn; the task may ask for less", unit="tokens")
    call: str = setting("", "put behind the first two turns, for a task that goes on only when a tool is called")


class Rehearsed(Task):
    """Every episode goes as in the task itself, its reward included, which is noted as `true_reward`. Random weights
    would earn none; so the reward trained on is 1 or 0 by a hash of what the policy wrote."""

    name = "rehearsed"
    Settings = RehearsedSettings

    def __init__(self, settings: RehearsedSettings, make_inner: Callable[[str, Mapping[str, Any]], Task]) -> None:
        """`make_inner`: makes the rehearsed task from its name and settings."""
        require_range("max_tokens", settings.max_tokens, 1, 10**6)
        if settings.name == self.name:
            raise UserError("task.args.name is 'rehearsed'; name the task that is rehearsed")
        self._settings = settings
        self._inner = make_inner(settings.name, settings.args)
        self.notes = self._inner.notes
        self.slots = self._inner.slots
        self.single_turn = self._inner.single_turn
        self.noted = self._inner.noted
        self.tables = getattr(self._inner, "tables", ())

    def digest(self) -> str:
        """Of the rows of the task, where it reads a data set."""
        digest = getattr(self._inner, "digest", None)
        return str(digest()) if callable(digest) else ""

    async def setup(self) -> None:
        await self._inner.setup()

    async def teardown(self) -> None:
        await self._inner.teardown()

    async def setup_episode(self, problem: Problem, session: Session) -> None:
        await self._inner.setup_episode(problem, session)

    async def teardown_episode(self, problem: Problem, session: Session) -> None:
        await self._inner.teardown_episode(problem, session)

    def fit(self, measure: Measure, context: int, *, answer: int | None = None) -> FitPrompts | None:
        settings: Any = getattr(self._inner, "settings", None)
        if getattr(settings, "overlong", "") == "refuse":  # tokens are bytes here: the model's own may be few enough
            self._inner.settings = replace(settings, overlong="truncate_left")
        found = self._inner.fit(measure, context, answer=self._settings.max_tokens if answer is None else answer)
        return found and replace(found, args={"args": {**self._settings.args, **found.args}})

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._inner.problems(split)

    async def rollout(self, problem: Problem, session: Session) -> float:
        settings = self._settings
        if settings.call == type(self._inner).example_call:  # the inner task may know how this model writes it
            settings = replace(settings, call=self._inner.example_call)
        short = ShortTurns(session, settings)
        reward = await self._inner.rollout(problem, short)
        parts = reward if isinstance(reward, Mapping) else {"": reward}
        for name, value in parts.items():
            if value is not None:
                session.note(f"true_reward/{name}" if name else "true_reward", float(value))
        said = [turn.text for turn in session.said]  # of an agent, too
        return float(stable_hash("".join(said)) & 1)

    @property
    def has_group_reward(self) -> bool:
        return self._inner.has_group_reward

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Sequence[Reward]:
        rewards: Any = self._inner.reward_group(problem, samples)
        if isawaitable(rewards):
            await rewards
        return [0.0] * len(samples)


class ShortTurns:
    """A session whose turns are at most so long. A call that is put behind a turn is environment text in the record,
    and part of the turn for the task."""

    def __init__(self, inner: Session, settings: RehearsedSettings) -> None:
        self._inner = inner
        self._settings = settings

    @property
    def turn(self) -> int:
        return self._inner.turn

    @property
    def truncated(self) -> bool:
        return self._inner.truncated

    @property
    def stopped(self) -> bool:
        return self._inner.stopped

    @property
    def template(self) -> str:
        return self._inner.template

    @property
    def said(self) -> Sequence[Utterance]:
        return self._inner.said

    @property
    def split(self) -> Split:
        return self._inner.split

    @property
    def seed(self) -> int:
        return self._inner.seed

    async def generate(self, *, max_tokens: int, **how: Any) -> str:
        text = await self._inner.generate(max_tokens=min(max_tokens, self._settings.max_tokens), **how)
        if self._settings.call and self._inner.turn <= CALLS and not self._inner.truncated:
            self._inner.append(self._settings.call)
            return text + self._settings.call
        return text

    def append(self, text: str) -> None:
        self._inner.append(text)

    def append_messages(self, messages: Sequence[Mapping[str, Any]], *, as_sampled: bool = False) -> None:
        self._inner.append_messages(messages, as_sampled=as_sampled)

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> int:
        return self._inner.start_context(prompt)

    def resume_context(self, number: int) -> None:
        self._inner.resume_context(number)

    async def score(self, text: str) -> Score:
        return await self._inner.score(text)

    def openai(self, *, max_tokens: int | None = None) -> Connection:
        most = self._settings.max_tokens
        return self._inner.openai(max_tokens=most if max_tokens is None else min(max_tokens, most))

    def slot(self, name: str) -> AbstractAsyncContextManager[None]:
        return self._inner.slot(name)

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        self._inner.reward_turn(value, agent=agent)

    def end_at_turn_limit(self) -> None:
        self._inner.end_at_turn_limit()

    def end_at_token_limit(self) -> None:
        self._inner.end_at_token_limit()

    def note(self, key: str, value: float | str) -> None:
        self._inner.note(key, value)

    def note_turn(self, key: str, value: float, *, agent: str | None = None) -> None:
        self._inner.note_turn(key, value, agent=agent)

    def note_tokens(self, key: str, values: Sequence[float], *, agent: str | None = None) -> None:
        self._inner.note_tokens(key, values, agent=agent)

    def keep(self, value: Any) -> None:
        self._inner.keep(value)
