"""Countdown: reach a target from given numbers (TinyZero's task; one of the three of the VCPO paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, Literal

from async_rl.config.schema import setting
from async_rl.errors import UserError
from async_rl.task.expression import ExpressionError, parse
from async_rl.task.generated import GeneratedTask, Prompt, require_range
from async_rl.task.protocol import Problem, Segment, Session

STOP = "."
TAG_OPEN, TAG_CLOSE = "<answer>", "</answer>"
INSTRUCTION = (
    "Using the numbers {numbers}, write an expression that equals {target}. You may use +, -, *, / and "
    "parentheses, and each number at most once. Think first, then give the expression alone as "
    "<answer>...</answer>, for example <answer>(1 + 2) * 3</answer>."
)
MOST_ATTEMPTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CountdownSettings:
    """Example: `task: {name: countdown, args: {num_numbers: 3, style: chat}}`."""

    num_numbers: int = setting(4, "numbers given", unit="numbers")
    max_number: int = setting(99, "largest number given")
    max_target: int = setting(100, "largest target")
    format_reward: float = setting(0.1, "reward of a well-formed expression of allowed numbers that misses the target")
    style: Literal["short", "chat"] = setting(
        "short", "short: `3 5 7=24:` for character models; chat: instructions as a user message"
    )
    max_tokens: int = setting(0, "longest answer; 0: 64 for style short, 1024 for chat", unit="tokens")
    num_train: int = setting(100_000, "training problems", unit="problems")
    num_eval: int = setting(256, "held-out problems", unit="problems")
    seed: int = setting(0, "decides the problems")


@dataclass(frozen=True, slots=True)
class Solution:
    """An expression that reaches a value, with the symbol that holds it together ("" for a number)."""

    text: str
    value: Fraction
    symbol: str


class Countdown(GeneratedTask):
    """`3 5 7=24:` is to be answered with an expression such as `(3+5)*3.`; every problem has a solution.

    Reward 1 for the exact target (rational arithmetic, no rounding) with each given number used at most
    once; `format_reward` when only the value is wrong; else 0.
    """

    name = "countdown"
    repeatable = True
    noted = ()
    single_turn = True
    Settings = CountdownSettings

    def __init__(self, settings: CountdownSettings) -> None:
        require_range("num_numbers", settings.num_numbers, 2, 8)
        require_range("max_number", settings.max_number, 2, 10**6)
        require_range("max_target", settings.max_target, 2, 10**9)
        require_range("format_reward", settings.format_reward, 0.0, 1.0)
        require_range("max_tokens", settings.max_tokens, 0, 10**6)
        self.settings: CountdownSettings = settings
        self.max_tokens = settings.max_tokens or (64 if settings.style == "short" else 1024)
        super().__init__(self._draw, num_train=settings.num_train, num_eval=settings.num_eval, seed=settings.seed)

    def _draw(self, random: Random) -> tuple[str, Prompt, Mapping[str, Any]]:
        for _ in range(MOST_ATTEMPTS):
            numbers = [random.randint(1, self.settings.max_number) for _ in range(self.settings.num_numbers)]
            solution = combine(numbers, random)
            target = solution.value
            if target.denominator == 1 and 0 < target <= self.settings.max_target and target not in numbers:
                break
        else:
            raise UserError(
                f"task.args allow hardly any countdown problem (none in {MOST_ATTEMPTS} draws); raise "
                "max_target or lower num_numbers"
            )
        data = {"numbers": tuple(numbers), "target": int(target), "solution": solution.text}
        # The order of the numbers does not make another problem.
        key = f"{sorted(numbers)} {target}"
        return key, self._prompt(numbers, int(target)), data

    def _prompt(self, numbers: list[int], target: int) -> Prompt:
        if self.settings.style == "short":
            return f"{' '.join(map(str, numbers))}={target}:"
        content = INSTRUCTION.format(numbers=", ".join(map(str, numbers)), target=target)
        return ({"role": "user", "content": content},)

    async def rollout(self, problem: Problem, session: Session) -> float:
        stop = STOP if self.settings.style == "short" else TAG_CLOSE
        text = await session.generate(max_tokens=self.max_tokens, stop=(stop,))
        if not session.stopped:
            session.end_at_token_limit()
        return self.score(self.answer_in(text), problem)

    def answer_in(self, text: str) -> str:
        """The expression in what the policy wrote; "" where it gave none."""
        if self.settings.style == "short":
            return text.split(STOP)[0].strip()
        _, found, rest = text.rpartition(TAG_OPEN)
        return rest.split(TAG_CLOSE)[0].strip() if found else ""

    def score(self, answer: str, problem: Problem) -> float:
        try:
            expression = parse(answer)
        except ExpressionError:
            return 0.0
        too_often = Counter(expression.numbers) - Counter(problem.data["numbers"])
        if too_often:
            return 0.0
        return 1.0 if expression.value == problem.data["target"] else self.settings.format_reward

    @property
    def alphabet(self) -> str:
        """For style short; the text of style chat is not for a character model."""
        return "0123456789 =:+-*/()" + STOP

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        answer: str = problem.data["solution"]
        if self.settings.style == "short":
            assert isinstance(problem.prompt, str)
            prompt, answer = problem.prompt, answer + STOP
        else:
            assert not isinstance(problem.prompt, str)
            prompt, answer = problem.prompt[0]["content"], TAG_OPEN + answer + TAG_CLOSE
        return [Segment(text=prompt, policy=False), Segment(text=answer, policy=True)]


def combine(numbers: list[int], random: Random) -> Solution:
    """A random expression of all the numbers, with no parentheses that are not needed."""
    parts = [Solution(str(number), Fraction(number), "") for number in numbers]
    while len(parts) > 1:
        left = parts.pop(random.randrange(len(parts)))
        right = parts.pop(random.randrange(len(parts)))
        symbols = "+-*" if right.value == 0 else "+-*/"
        parts.append(_join(left, random.choice(symbols), right))
    return parts[0]


def _join(left: Solution, symbol: str, right: Solution) -> Solution:
    # a-(b+c), a/(b*c) and everything below * and / need them; a+(b-c) and a*(b/c) do not.
    open_left = symbol in "*/" and left.symbol in ("+", "-")
    open_right = (symbol != "+" and right.symbol in ("+", "-")) or (symbol == "/" and right.symbol in ("*", "/"))
    text = (f"({left.text})" if open_left else left.text) + symbol + (f"({right.text})" if open_right else right.text)
    match symbol:
        case "+":
            value = left.value + right.value
        case "-":
            value = left.value - right.value
        case "*":
            value = left.value * right.value
        case _:
            value = left.value / right.value
    return Solution(text, value, symbol)
