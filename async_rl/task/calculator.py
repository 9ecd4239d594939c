"""A tool in several turns: the model calls a calculator, reads its result, and then answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.expression import ExpressionError, parse
from async_rl.task.generated import GeneratedTask, require_range, stable_hash
from async_rl.task.protocol import Problem, Segment, Session

ASK = "?"
CALL_OPEN, CALL_CLOSE = "[", "]"
ANSWER_OPEN, ANSWER_CLOSE = "#", "."
RESULT_OPEN, RESULT_CLOSE, NO_RESULT = "=", ";", "?"
OPERATIONS = "+-*"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalculatorSettings:
    """Example: `task: {name: calculator, args: {digits: 3, num_operands: 3, call_reward: 0.1}}`."""

    digits: int = setting(3, "of each operand; large enough that the model cannot do without the tool", unit="digits")
    num_operands: int = setting(3, "numbers in a problem", unit="numbers")
    operations: str = setting("+-*", "which of + - * occur")
    operators_per_call: int = setting(1, "longest calculation the tool does at once", unit="operators")
    max_turns: int = setting(5, "calls and the answer together", unit="turns")
    max_tokens: int = setting(32, "longest turn", unit="tokens")
    call_reward: float = setting(
        0.0, "turn reward of a call the tool could do; only recipes with turn-level credit see it"
    )
    num_train: int = setting(100_000, "training problems", unit="problems")
    num_eval: int = setting(256, "held-out problems", unit="problems")
    seed: int = setting(0, "decides the problems")


class Calculator(GeneratedTask):
    """`12+7*35?` `[7*35]` `=245;` `[12+245]` `=257;` `#257.`: the policy writes `[...]` and `#...`.

    A turn ends at `]` (a call) or `.` (the answer). The tool answers `=245;`, or `=?;` when it cannot: no
    expression, more operators than `operators_per_call`, or a division by zero. A turn that holds neither a
    call nor an answer is void; it is answered `=?;` too and counted (some recipes leave such episodes out).
    Reward 1 for the right answer, else 0. Notes: `tool_calls`, `tool_errors`, `void_turns`.
    """

    name = "calculator"
    repeatable = True
    noted = ("tool_calls", "tool_errors", "void_turns", "void")
    Settings = CalculatorSettings

    def __init__(self, settings: CalculatorSettings) -> None:
        require_range("digits", settings.digits, 1, 15)
        require_range("num_operands", settings.num_operands, 2, 10)
        require_range("operators_per_call", settings.operators_per_call, 1, 100)
        require_range("max_turns", settings.max_turns, 1, 1000)
        require_range("max_tokens", settings.max_tokens, 1, 10**6)
        if not settings.operations or not set(settings.operations) <= set(OPERATIONS):
            raise UserError(f"task.args.operations is {settings.operations!r}; write some of {OPERATIONS}")
        self.settings: CalculatorSettings = settings
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def _draw(self, random: Random) -> tuple[str, str, Mapping[str, Any]]:
        low, high = 10 ** (self.settings.digits - 1), 10**self.settings.digits - 1
        asked = str(random.randint(low, high))
        for _ in range(self.settings.num_operands - 1):
            asked += random.choice(self.settings.operations) + str(random.randint(low, high))
        value = parse(asked).value
        assert value is not None
        return asked, asked + ASK, {"expression": asked, "answer": str(value)}

    async def rollout(self, problem: Problem, session: Session) -> float:
        count = {"tool_calls": 0, "tool_errors": 0, "void_turns": 0}
        seen: list[str] = []
        reward = 0.0
        for _ in range(self.settings.max_turns):
            text = await session.generate(
                max_tokens=self.settings.max_tokens,
                stop=(CALL_CLOSE, ANSWER_CLOSE),
                state_key=stable_hash("".join(seen)),
            )
            answer, call = read_answer(text), read_call(text)
            if answer is not None:
                reward = float(answer == problem.data["answer"])
                break
            if session.truncated:
                break  # the context is full: no further turn can be taken
            result = None if call is None else self.calculate(call)
            count["void_turns"] += call is None
            session.note_turn("void", float(call is None))
            count["tool_calls"] += call is not None
            count["tool_errors"] += call is not None and result is None
            if result is not None and self.settings.call_reward:
                session.reward_turn(self.settings.call_reward)
            seen.append(RESULT_OPEN + (result or NO_RESULT) + RESULT_CLOSE)
            session.append(seen[-1])
        else:
            session.end_at_turn_limit()
        for key, value in count.items():
            session.note(key, float(value))
        return reward

    def calculate(self, call: str) -> str | None:
        """The tool's result, or None when it cannot compute `call`."""
        try:
            expression = parse(call)
        except ExpressionError:
            return None
        if expression.value is None or expression.num_operators > self.settings.operators_per_call:
            return None
        return str(expression.value)

    @property
    def alphabet(self) -> str:
        return "0123456789+-*/()" + "".join(
            (ASK, CALL_OPEN, CALL_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, RESULT_OPEN, RESULT_CLOSE)
        )

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """One operation a call, products first, then the answer."""
        assert isinstance(problem.prompt, str)
        segments = [Segment(text=problem.prompt, policy=False)]
        for call, result in steps(problem.data["expression"]):
            segments.append(Segment(text=CALL_OPEN + call + CALL_CLOSE, policy=True))
            segments.append(Segment(text=RESULT_OPEN + result + RESULT_CLOSE, policy=False))
        segments.append(Segment(text=ANSWER_OPEN + problem.data["answer"] + ANSWER_CLOSE, policy=True))
        return segments


def read_call(text: str) -> str | None:
    """The text in the last brackets of a turn that ends with one; else None."""
    if not text.endswith(CALL_CLOSE):
        return None
    _, found, call = text.removesuffix(CALL_CLOSE).rpartition(CALL_OPEN)
    return call if found else None


def read_answer(text: str) -> str | None:
    """The text between the last `#` and the final `.` of a turn that ends with one; else None."""
    if not text.endswith(ANSWER_CLOSE):
        return None
    _, found, answer = text.removesuffix(ANSWER_CLOSE).rpartition(ANSWER_OPEN)
    return answer.strip() if found else None


def steps(expression: str) -> list[tuple[str, str]]:
    """(call, result) of each operation of a chain without parentheses, in order of precedence."""
    operands = re.split(r"[-+*]", expression)
    symbols = re.findall(r"[-+*]", expression)
    done = []
    while symbols:
        at = next((i for i, symbol in enumerate(symbols) if symbol == "*"), 0)
        call = operands[at] + symbols[at] + operands[at + 1]
        value = parse(call).value
        assert isinstance(value, Fraction)
        done.append((call, str(value)))
        operands[at : at + 2] = [str(value)]
        del symbols[at]
    return done
