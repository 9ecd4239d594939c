"""Rewards of an episode against the answer of its row: exact, numeric, math, or a function of the user's own."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.task.calling import (
    Note,
    RewardFunction,
    as_reward_function,
    check_columns,
    check_name,
    load_reward_function,
)
from async_rl.task.json_child import JsonChild
from async_rl.task.protocol import Problem, Sample, Session, Utterance
from async_rl.task.protocol import Reward as RewardValue
from async_rl.task.weigh import RewardError, as_reward
from async_rl.trajectory import Ended
from async_rl.trajectory.parts import PREFIX

NAMES = ("exact", "numeric", "math")
"""the built-in rewards: their reward is a plain number"""
NO_REWARD = "none"
"""where a group reward alone decides"""

NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?"  # a sign, unless it subtracts
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/[0-9]+)?(?:[eE][-+]?[0-9]+)?"
)
MOST_CHARACTERS = 400
"""longer numbers are not read"""
TOLERANCE = Fraction(1, 10**6)
"""largest relative difference of two equal numbers that are not whole"""
DEADLINE_S = 5
"""longest time for one verdict of math-verify"""
START_DEADLINE_S = 60.0
"""longest time for the start of its process"""
GRACE_S = 2.0
"""added to DEADLINE_S by the parent, because the child ends itself first"""


class Reward:
    """A reward by name. Example: `await make_reward("numeric").score("so 1,200.", "1200", problem) == 1.0`."""

    def __init__(self, name: str, function: Callable[..., Any] | RewardFunction, *, answer_field: str = "") -> None:
        """`answer_field`: field of the rows with the answer, which a function may take under that name."""
        self.name = name
        self.answer_field = answer_field
        if not isinstance(function, RewardFunction):
            function = as_reward_function(name, function, where=f"reward '{name}'")
        self.function = function

    async def score(self, completion: str, answer: str, problem: Problem) -> Any:
        """The reward of one text; see `judge`."""
        problem = replace(problem, data={**problem.data, "answer": answer})
        said = (Utterance(text=completion, tokens=()),)
        return await self.judge(Sample(problem=problem, said=said, transcript=completion))

    async def judge(self, sample: Sample, note: Note = lambda key, value: None) -> RewardValue:
        """The reward of one episode: a finite number, or named parts. `note`: attaches what else the function says to
        the trajectory. Raises RewardError with the reason, or VerdictTimeout.

        A plain function blocks this process's other episodes while it runs; one that waits for something should be
        `async def`.
        """
        return (await self._judged([sample], [note]))[0]

    async def judge_group(self, samples: Sequence[Sample]) -> list[RewardValue]:
        """The rewards of all samples of a group. Raises as `judge` does."""
        return await self._judged(samples, [lambda key, value: None] * len(samples))

    async def _judged(self, samples: Sequence[Sample], notes: Sequence[Note]) -> list[RewardValue]:
        try:
            found = await self.function.call(samples, self.answer_field, notes)
        except VerdictTimeout:
            raise
        except RewardError as error:
            raise RewardError(f"reward '{self.name}' {error}") from None
        except Exception as error:  # code of others: its error ends this trajectory only
            raise RewardError(f"reward '{self.name}' raised {type(error).__name__}: {error}") from error
        return [self._value(value, note) for value, note in zip(found, notes, strict=True)]

    def _value(self, value: Any, note: Note) -> RewardValue:
        convention, said = self.function.signature.convention, f"reward '{self.name}' returned"
        if value is None and convention == "trl":
            note("reward_not_applicable", 1.0)
            return {}
        if isinstance(value, Mapping) and convention.startswith("verl"):
            # what stands beside the score is recorded and not added: so does verl
            if "score" not in value:
                raise RewardError(f"{said} {dict(value)!r:.100}, without 'score'")
            for key, more in value.items():
                if key != "score":
                    note(f"{PREFIX}{key}", float(more)) if is_number(more) else note(str(key), str(more))
            return as_reward(value["score"], said)
        if isinstance(value, Mapping):
            return {key: None if part is None else as_reward(part, f"{said} {key}:") for key, part in value.items()}
        return as_reward(value, said)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, of Python, numpy or torch."""
    if isinstance(value, str | bytes | bytearray):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def make_reward(name: str, *, answer_field: str = "") -> Reward:
    """The reward called `name`: exact, numeric, math, none, `module:function` or `path/file.py:function`
    (async_rl.config.imports). Raises UserError for one that is unknown or cannot be imported."""
    match name:
        case "exact":
            return Reward(name, any_accepted(exact))
        case "numeric":
            return Reward(name, any_accepted(numeric))
        case "math":
            return Reward(name, _math(MathJudge()))
        case "none":
            return Reward(name, lambda sample: 0.0)
    check_name(name, (*NAMES, NO_REWARD), where="task.args.reward")
    return Reward(name, load_reward_function(name, where="task.args.reward"), answer_field=answer_field)


def make_rewards(name: str, group: str, answer_field: str) -> tuple[Reward, Reward | None]:
    """The rewards that `task.args.reward` and `task.args.group_reward` name; `group` may be empty. Raises UserError."""
    if not group:
        if name == NO_REWARD:
            raise UserError("task.args.reward is 'none', which needs task.args.group_reward; name a reward or both")
        return make_reward(name, answer_field=answer_field), None
    where = "task.args.group_reward"
    check_name(group, (), where=where)
    judge = load_reward_function(group, where=where, whole_group=True)
    return make_reward(name, answer_field=answer_field), Reward(group, judge, answer_field=answer_field)


def check_rows(rewards: Iterable[Reward | None], splits: Iterable[Sequence[Problem]]) -> None:
    """Raises UserError when one of them takes a field that a row lacks."""
    problems = list(splits)
    for reward in rewards:
        if reward is not None:
            where = f"task.args.{'group_reward' if reward.function.whole_group else 'reward'}"
            for split in problems:
                check_columns(reward.function, split, where=where, answer_field=reward.answer_field)


def sample_of(problem: Problem, session: Session, text: str, *, transcript: str, ended: Ended) -> Sample:
    """The episode so far, whose answer is `text`, as a reward sees it."""
    said = [*session.said]
    if not said:
        said = [Utterance(text=text, tokens=())]
    elif said[-1].text != text:
        said[-1] = replace(said[-1], text=text)
    whole = transcript or "".join(turn.text for turn in said)
    return Sample(problem=problem, said=tuple(said), transcript=whole, ended=ended)


Answer = str | Sequence[str]
"""text, or all texts that are right"""


def accepted(answer: Answer) -> Sequence[str]:
    """Every answer that is right."""
    return [answer] if isinstance(answer, str) else answer


def any_accepted(verdict: Callable[[str, str, Problem], float]) -> Callable[..., float]:
    """The best verdict on any of the accepted answers."""

    def judged(completion: str, answer: Answer, problem: Problem) -> float:
        return max(verdict(completion, one, problem) for one in accepted(answer))

    return judged


def exact(completion: str, answer: str, problem: Problem) -> float:
    """1 when the completion is the answer, but for white space at the ends."""
    return float(completion.strip() == answer.strip())


def numeric(completion: str, answer: str, problem: Problem) -> float:
    """1 when the last number of the completion equals the last number of the answer.

    `1,200`, `1200.0`, `2400/2` and `1.2e3` are equal. Whole numbers must be equal exactly; others to one
    part in a million, since written decimals are rounded. Raises ValueError for an answer without number.
    """
    wanted, found = last_number(answer), last_number(completion)
    if wanted is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    if found is None:
        return 0.0
    if wanted.denominator == 1:
        return float(found == wanted)
    return float(abs(found - wanted) <= TOLERANCE * abs(wanted))


def last_number(text: str) -> Fraction | None:
    """The last number in `text`; None when it holds none, or one of absurd size."""
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None or len(found[0]) > MOST_CHARACTERS:
        return None
    mantissa, _, exponent = found[0].replace(",", "").replace("\u2212", "-").lower().partition("e")
    if len(exponent) > 4:  # 1e999999999 would fill the memory
        return None
    numerator, _, denominator = mantissa.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1) * Fraction(10) ** int(exponent or 0)


def _math(judge: MathJudge) -> Callable[..., Any]:
    async def mathematics(completion: str, answer: Answer, problem: Problem) -> float:
        timeout: VerdictTimeout | None = None
        for one in accepted(answer):
            try:
                # in a thread, because a verdict takes milliseconds to seconds and decoding must go on
                if await asyncio.to_thread(judge.score, completion, one):
                    return 1.0
            except VerdictTimeout as late:
                timeout = late
        if timeout is not None:  # nobody knows whether it is that answer
            raise timeout
        return 0.0

    return mathematics


class JudgeError(Exception):
    """There is no verdict, for a reason outside the completion."""


class VerdictTimeout(Exception):
    """The completion could not be judged in time."""


class MathJudge:
    """math-verify in a child process (math_worker.py). Any thread may ask; one verdict at a time.

    math-verify guards itself with SIGALRM, which fails outside the main thread and disturbs an event loop; without
    that guard `9^{9^{9^9}}` hangs it, and may fill the machine's memory. So it runs in a child without its guard, with
    a kernel alarm and a memory limit. The child starts with the first question, is replaced when it dies, and ends with
    this process.
    """

    def __init__(self, *, deadline_s: int = DEADLINE_S) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the reward 'math' needs math-verify: pip install math-verify")
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        # -P: files beside the worker (order.py, ...) must not hide modules that math-verify imports
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py")), str(deadline_s)]
        self._child = JsonChild(command=command, start_s=START_DEADLINE_S)

    def score(self, completion: str, answer: str) -> float:
        """1.0 or 0.0. Raises VerdictTimeout or JudgeError. Blocks for at most `deadline_s`, and the first time while
        the child starts."""
        with self._lock:
            if not self._child.start():
                raise JudgeError("the process that runs math-verify did not start; try: python -c 'import math_verify'")
            try:
                question = {"completion": completion, "answer": answer}
                verdict = self._child.ask(question, within_s=self._deadline_s + GRACE_S)
            except BrokenPipeError:
                raise JudgeError("the process that runs math-verify has died") from None
            if verdict is None:
                raise VerdictTimeout(f"no verdict within {self._deadline_s} s")
        if "error" in verdict:
            raise JudgeError(verdict["error"])
        return float(verdict["score"])

    def close(self) -> None:
        with self._lock:
            self._child.stop()
