"""Problems made from their index: nothing is stored, and no held-out problem is ever trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from async_rl.errors import UserError
from async_rl.task.problems import ProblemsOnDemand
from async_rl.task.protocol import Problem, Task
from async_rl.trajectory import Split

HELD_OUT_ONE_IN = 8
"""of all possible problems, the share that belongs to the eval split"""
MOST_DRAWS = 10_000

Prompt = str | Sequence[Mapping[str, Any]]
Draw = Callable[[Random], tuple[str, Prompt, Mapping[str, Any]]]
"""random numbers -> (key that says which problem it is, prompt, data)"""


def stable_hash(text: str) -> int:
    """63 bits of `text`, the same in every process and version (Python's own `hash` is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless low <= task.args.`name` <= high."""
    if not low <= value <= high:
        raise UserError(f"task.args.{name} is {value}; it must lie between {low} and {high}")


class Generated(ProblemsOnDemand):
    """The problems of one split. Problem i is drawn with random numbers keyed by (seed, split, i).

    A hash of the problem's key, not the index, decides the split a problem belongs to: a draw that belongs
    to the other split is drawn again. The same problem may occur twice within a split, never in both.
    """

    def __init__(
        self, draw: Draw, *, num_problems: int, seed: int, split: Split, held_out_one_in: int = HELD_OUT_ONE_IN
    ) -> None:
        self._draw = draw
        self._held_out_one_in = held_out_one_in
        self._num_problems = num_problems
        self._seed = seed
        self._split = split

    def __len__(self) -> int:
        return self._num_problems

    def make(self, index: int) -> Problem:
        random = Random(f"{self._seed}/{self._split}/{index}")
        for _ in range(MOST_DRAWS):
            key, prompt, data = self._draw(random)
            held_out = stable_hash(key) % self._held_out_one_in == 0
            if held_out == (self._split == "eval"):
                return Problem(index=index, prompt=prompt, data=data)
        raise UserError(
            f"task.args allow too few different problems to keep some for evaluation (none for '{self._split}' "
            f"in {MOST_DRAWS} draws); make the problems larger"
        )


class GeneratedTask(Task):
    """The part that tasks with made-up problems share: both splits, checked once when the task is made."""

    def __init__(
        self, draw: Draw, *, num_train: int, num_eval: int, seed: int, held_out_one_in: int = HELD_OUT_ONE_IN
    ) -> None:
        require_range("num_train", num_train, 1, 10**9)
        require_range("num_eval", num_eval, 1, 10**6)
        require_range("seed", seed, 0, 2**63 - 1)
        self._train = Generated(draw, num_problems=num_train, seed=seed, split="train", held_out_one_in=held_out_one_in)
        self._eval = Generated(draw, num_problems=num_eval, seed=seed, split="eval", held_out_one_in=held_out_one_in)
        # Where either split is impossible this raises now, not in the middle of a run.
        assert self._train[0].index == self._eval[0].index == 0

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._train if split == "train" else self._eval

    @property
    def reward_parts(self) -> Sequence[str] | None:
        """Those of this package give plain numbers; a class derived from one may give anything."""
        return () if type(self).__module__.startswith("async_rl.task.") else None
