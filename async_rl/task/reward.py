"""Rewards of a completion against the answer of its row: exact, numeric, math, or a function of the user's own."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from async_rl.config.imports import is_import, load_function
from async_rl.errors import UserError, nearest
from async_rl.task.protocol import Problem

NAMES = ("exact", "numeric", "math")
Function = Callable[[str, str, Problem], Any]
"""(completion, answer, problem) -> number, or a coroutine that returns one"""

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


class RewardError(Exception):
    """A reward function raised, or returned something that is not a finite number."""


class Reward:
    """A reward by name. Example: `await make_reward("numeric").score("so 1,200.", "1200", problem) == 1.0`."""

    def __init__(self, name: str, function: Function) -> None:
        self.name = name
        self._function = function

    async def score(self, completion: str, answer: str, problem: Problem) -> float:
        """The reward, finite. Raises RewardError with the reason, or VerdictTimeout.

        A plain function blocks this process's other episodes while it runs; one that waits for something should be
        `async def`.
        """
        try:
            value = self._function(completion, answer, problem)
            if inspect.isawaitable(value):
                value = await value
        except VerdictTimeout:
            raise
        except Exception as error:  # code of others: its error ends this trajectory only
            raise RewardError(f"reward '{self.name}' raised {type(error).__name__}: {error}") from error
        try:
            reward = float(value)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(f"reward '{self.name}' returned {value!r:.100}, not a number") from None
        if not math.isfinite(reward):
            raise RewardError(f"reward '{self.name}' returned {reward}")
        return reward


def make_reward(name: str) -> Reward:
    """The reward called `name`: exact, numeric, math, `module:function` or `path/file.py:function`
    (async_rl.config.imports). Raises UserError for one that is unknown or cannot be imported."""
    match name:
        case "exact":
            return Reward(name, exact)
        case "numeric":
            return Reward(name, numeric)
        case "math":
            return Reward(name, _math(MathJudge()))
        case _ if is_import(name):
            taken = "(completion, answer, problem)"
            return Reward(name, load_function(name, where=f"task.args.reward '{name}'", arguments=taken))
        case _:
            raise UserError(
                f"task.args.reward '{name}' is not known; {nearest(name, NAMES)} (or module:function, file.py:function)"
            )


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


def _math(judge: MathJudge) -> Function:
    async def mathematics(completion: str, answer: str, problem: Problem) -> float:
        # in a thread, because a verdict takes milliseconds to seconds and decoding must go on
        return await asyncio.to_thread(judge.score, completion, answer)

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
        self._child: subprocess.Popen[bytes] | None = None

    def score(self, completion: str, answer: str) -> float:
        """1.0 or 0.0. Raises VerdictTimeout or JudgeError. Blocks for at most `deadline_s`, and the first time while
        the child starts."""
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps({"completion": completion, "answer": answer}).encode() + b"\n")
                child.stdin.flush()
            except BrokenPipeError:
                self._stop()
                raise JudgeError("the process that runs math-verify has died") from None
            verdict = self._read(child, self._deadline_s + GRACE_S)
            if verdict is None:
                self._stop()
                raise VerdictTimeout(f"no verdict within {self._deadline_s} s")
        if "error" in verdict:
            raise JudgeError(verdict["error"])
        return float(verdict["score"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        worker = Path(__file__).with_name("math_worker.py")
        # -P: files beside the worker (order.py, ...) must not hide modules that math-verify imports
        command = [sys.executable, "-P", str(worker), str(self._deadline_s)]
        child = self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._read(child, START_DEADLINE_S) is None:
            self._stop()
            raise JudgeError("the process that runs math-verify did not start; try: python -c 'import math_verify'")
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        child.wait()

    @staticmethod
    def _read(child: subprocess.Popen[bytes], deadline_s: float) -> dict[str, str] | None:
        """The child's next line; None when it died or answered nothing in time."""
        assert child.stdout is not None
        until = time.monotonic() + deadline_s
        line = b""
        while not line.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                return None
            read = child.stdout.read(65536)
            if not read:
                return None
            line += read
        answer: dict[str, str] = json.loads(line)
        return answer
