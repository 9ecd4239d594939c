"""In which order the problems are asked, and which are evaluated: pure functions, so that a position is all there is to
save."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CACHED_EPOCHS = 2
"""permutations kept: positions asked for together may straddle the end of an epoch"""


Choice = Literal["spread", "first"]


def choose_held_out(count: int, num_problems: int, choice: Choice) -> tuple[int, ...]:
    """`count` of the held-out problems, or all: those that a fixed permutation puts first (`spread`), because a file is
    often sorted by subject, or those that the file has first. A larger choice begins with the smaller one."""
    if count >= num_problems or choice == "first":
        return tuple(range(min(count, num_problems)))
    return tuple(_shuffled((num_problems,), num_problems)[:count].tolist())


def _shuffled(key: tuple[int, ...], count: int) -> NDArray[np.int64]:  # [count]
    """A permutation that sorts 64 raw bits each from PCG64."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


class PromptOrder:
    """Position in the run -> index of a problem; every epoch is a fresh permutation of all problems.

    The permutation of an epoch sorts 64 raw bits a problem from PCG64, keyed by (seed, epoch). NumPy keeps
    the raw stream of a bit generator the same in all its versions, unlike `Generator.permutation`, so a run
    resumed under another NumPy goes on in the same order.
    """

    def __init__(self, num_problems: int, seed: int) -> None:
        if num_problems < 1:
            raise ValueError(f"an order needs at least one problem, not {num_problems}")
        if seed < 0:
            raise ValueError(f"the seed of an order must not be negative, not {seed}")
        self.num_problems = num_problems
        self.seed = seed
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __call__(self, position: int) -> int:
        """Index of the problem at `position` >= 0."""
        if position < 0:
            raise ValueError(f"positions start at 0, not {position}")
        epoch, offset = divmod(position, self.num_problems)
        return int(self._permutation(epoch)[offset])

    def stretch(self, position: int, count: int) -> list[int]:
        """The problems at `position` >= 0 and behind it, `count` in all."""
        epoch, offset = divmod(position, self.num_problems)
        found: list[int] = self._permutation(epoch)[offset : offset + count].tolist()
        return found if len(found) == count else found + self.stretch(position + len(found), count - len(found))

    def epoch(self, position: int) -> int:
        """How often every problem has been asked before `position`."""
        return position // self.num_problems

    def _permutation(self, epoch: int) -> NDArray[np.int64]:  # [problems]
        known = self._epochs.get(epoch)
        if known is None:
            known = self._epochs[epoch] = _shuffled((self.seed, epoch), self.num_problems)
            if len(self._epochs) > CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return known
