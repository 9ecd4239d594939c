"""Sorting and reversing letters: the smallest tasks with one turn and an exact answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Any

from async_rl.config.schema import setting
from async_rl.task.generated import GeneratedTask, require_range
from async_rl.task.protocol import Problem, Segment, Session

ASK, STOP = "=", "."


@dataclass(frozen=True, slots=True, kw_only=True)
class LettersSettings:
    """Example: `task: {name: sort, args: {length: 8}}`."""

    length: int = setting(6, "letters in a problem", unit="letters")
    alphabet_size: int = setting(10, "the first so many letters of the alphabet occur", unit="letters")
    partial_reward: bool = setting(False, "reward the share of right positions instead of only an exact answer")
    num_train: int = setting(100_000, "training problems", unit="problems")
    num_eval: int = setting(256, "held-out problems", unit="problems")
    seed: int = setting(0, "decides the problems")


class Letters(GeneratedTask):
    """`dbca=` is to be answered with `abcd.` (sort) or `acbd.` (reverse). Letters may repeat."""

    single_turn = True
    Settings = LettersSettings

    def __init__(self, settings: LettersSettings) -> None:
        require_range("length", settings.length, 1, 1000)
        require_range("alphabet_size", settings.alphabet_size, 2, 26)
        self.settings: LettersSettings = settings
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def solve(self, letters: str) -> str:
        raise NotImplementedError

    def _draw(self, random: Random) -> tuple[str, str, Mapping[str, Any]]:
        letters = "".join(random.choices(ascii_lowercase[: self.settings.alphabet_size], k=self.settings.length))
        return letters, letters + ASK, {"answer": self.solve(letters)}

    async def rollout(self, problem: Problem, session: Session) -> float:
        text = await session.generate(max_tokens=self.settings.length + len(STOP), stop=(STOP,))
        if not session.stopped:
            session.end_at_token_limit()
        return self.score(text, problem.data["answer"])

    def score(self, text: str, answer: str) -> float:
        """In [0, 1]. The text counts up to the stop, or to the end of text."""
        given = text.split(STOP)[0].strip()
        if not self.settings.partial_reward:
            return float(given == answer)
        right = sum(a == b for a, b in zip(given, answer, strict=False))
        return right / max(len(given), len(answer))

    @property
    def alphabet(self) -> str:
        return ascii_lowercase[: self.settings.alphabet_size] + ASK + STOP

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        assert isinstance(problem.prompt, str)
        return [
            Segment(text=problem.prompt, policy=False),
            Segment(text=problem.data["answer"] + STOP, policy=True),
        ]


class Sort(Letters):
    name = "sort"
    repeatable = True
    noted = ()

    def solve(self, letters: str) -> str:
        return "".join(sorted(letters))


class Reverse(Letters):
    name = "reverse"
    repeatable = True
    noted = ()

    def solve(self, letters: str) -> str:
        return letters[::-1]
