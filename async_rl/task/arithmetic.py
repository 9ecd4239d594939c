"""Sums, differences and products of whole numbers, in one turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.generated import GeneratedTask, require_range
from async_rl.task.protocol import Problem, Segment, Session

ASK, STOP = "=", "."
OPERATIONS = "+-*"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticSettings:
    """Example: `task: {name: arithmetic, args: {digits: 2, operations: "+-", reversed_answer: true}}`."""

    digits: int = setting(2, "longest operand", unit="digits")
    operations: str = setting("+", "which of + - * occur")
    reversed_answer: bool = setting(
        False, "the answer is written least digit first, which a small model learns far faster"
    )
    num_train: int = setting(100_000, "training problems", unit="problems")
    num_eval: int = setting(256, "held-out problems", unit="problems")
    seed: int = setting(0, "decides the problems")


class Arithmetic(GeneratedTask):
    """`12+39=` is to be answered with `51.`, or `15.` with `reversed_answer` (`-7` is then `7-`)."""

    name = "arithmetic"
    repeatable = True
    noted = ()
    single_turn = True
    Settings = ArithmeticSettings

    def __init__(self, settings: ArithmeticSettings) -> None:
        require_range("digits", settings.digits, 1, 100)
        chosen = settings.operations
        if not chosen or not set(chosen) <= set(OPERATIONS):
            raise UserError(f"task.args.operations is {chosen!r}; write some of {OPERATIONS}")
        self.settings: ArithmeticSettings = settings
        longest = 2 * settings.digits if "*" in chosen else settings.digits + 1
        self.max_tokens = longest + len(STOP)
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def _draw(self, random: Random) -> tuple[str, str, Mapping[str, Any]]:
        left, right = (random.randrange(10**self.settings.digits) for _ in range(2))
        operation = random.choice(self.settings.operations)
        match operation:
            case "+":
                result = left + right
            case "-":
                result = left - right
            case _:
                result = left * right
        answer = str(result)[::-1] if self.settings.reversed_answer else str(result)
        asked = f"{left}{operation}{right}"
        return asked, asked + ASK, {"answer": answer}

    async def rollout(self, problem: Problem, session: Session) -> float:
        text = await session.generate(max_tokens=self.max_tokens, stop=(STOP,))
        if not session.stopped:
            session.end_at_token_limit()
        return float(text.split(STOP)[0].strip() == problem.data["answer"])

    @property
    def alphabet(self) -> str:
        return "".join(dict.fromkeys("0123456789-" + self.settings.operations + ASK + STOP))

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        assert isinstance(problem.prompt, str)
        return [
            Segment(text=problem.prompt, policy=False),
            Segment(text=problem.data["answer"] + STOP, policy=True),
        ]
