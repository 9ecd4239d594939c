"""From what a task returns to the number that is trained: named parts, weighed and summed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from async_rl.errors import UserError, nearest
from async_rl.task.protocol import Task
from async_rl.trajectory.types import MOST_REWARD

MOST_PARTS = 64
"""parts of one episode"""
NAME = re.compile(r"[^\s/]([^/\n\r]{0,58}[^\s/])?")
"""1 to 60 characters; a slash would make another metric of it"""
ROLLOUT, GROUP = "rollout", "group"
"""where a task has a group reward: the parts that stand for a plain number of `rollout` and of `reward_group`"""


class RewardError(Exception):
    """What a task or a reward function returned is no reward, or it raised."""


class Weighed(Struct, frozen=True, kw_only=True):
    """The reward of one episode."""

    total: float
    parts: Mapping[str, float] = {}
    """as they were returned, unweighted; those given as None left out. Empty: the reward is a plain number"""
    named: frozenset[str] = frozenset()
    """all names that were returned, also those given as None"""
    nothing: bool = False
    """an empty mapping was returned: no part applies to this episode"""

    def __add__(self, other: Weighed) -> Weighed:
        return Weighed(
            total=self.total + other.total,
            parts={**self.parts, **other.parts},
            named=self.named | other.named,
            nothing=self.nothing and other.nothing,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What each part counts: `task.reward_weights`; a part that is not named there counts once."""

    chosen: Mapping[str, float] = field(default_factory=dict)

    def weigh(self, reward: Any, *, number: str = "") -> Weighed:
        """The sum of weight x part, or the number itself.

        Args:
            number: name of the part that a plain number is recorded as; empty: a plain number has no parts.

        Raises RewardError for anything else than a number of at most MOST_REWARD in size or a mapping of names to such
        numbers and None."""
        if not isinstance(reward, Mapping):
            value = as_reward(reward, "the reward is")
            return self.weigh({number: value}) if number else Weighed(total=value)
        if len(reward) > MOST_PARTS:
            raise RewardError(f"the reward has {len(reward)} parts; {MOST_PARTS} are possible")
        parts: dict[str, float] = {}
        for name, value in reward.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise RewardError(f"a part of the reward is called {name!r:.80}; a name has 1 to 60 characters, no /")
            if value is not None:
                parts[name] = as_reward(value, f"the reward's part '{name}' is")
        total = sum((self.chosen.get(name, 1.0) * value for name, value in parts.items()), 0.0)
        as_reward(total, "the weighed sum of the reward's parts is")
        return Weighed(total=total, parts=parts, named=frozenset(reward), nothing=not reward)

    def check(self, found: Weighed) -> None:
        """Raises RewardError when `task.reward_weights` names a part that the episode's reward did not return."""
        if not self.chosen or found.nothing:
            return
        if not found.named:
            raise RewardError(
                f"task.reward_weights names {', '.join(self.chosen)}, but the reward is a plain number; return a "
                "mapping of names to numbers, or leave task.reward_weights out"
            )
        for name in self.chosen:
            if name not in found.named:
                raise RewardError(
                    f"task.reward_weights names '{name}', which the reward did not return; "
                    f"{nearest(name, found.named)} (None in the mapping says that a part does not apply)"
                )


def weights_of(task: Task, chosen: Mapping[str, float]) -> Weights:
    """The weights of a task's parts. `chosen`: task.reward_weights. Raises UserError for a name that is known to be
    none of its parts."""
    known = task.reward_parts
    for name in chosen:
        if not NAME.fullmatch(name):
            raise UserError(f"task.reward_weights: {name!r:.80} is no name; it has 1 to 60 characters, no /")
        if known is not None and not known:
            raise UserError(
                f"task.reward_weights names '{name}', but the reward of task '{task.name}' is a plain number; leave "
                "it out, or give a reward that returns named parts"
            )
        if known is not None and name not in known:
            raise UserError(f"task.reward_weights names '{name}', no part of the reward; {nearest(name, known)}")
    return Weights(chosen=dict(chosen))


def has_group_reward(task: Task) -> bool:
    """Whether the task judges whole groups."""
    return bool(getattr(task, "has_group_reward", False))


def as_reward(value: Any, said: str) -> float:
    """`value` as a number. Raises RewardError, which begins with `said`, for anything else than one of at most
    MOST_REWARD in size."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(f"{said} {value!r:.100}, not a number") from None
    if not math.isfinite(number):
        raise RewardError(f"{said} {number}")
    if abs(number) > MOST_REWARD:
        raise RewardError(f"{said} {number:g}; a reward lies between -{MOST_REWARD:g} and {MOST_REWARD:g}")
    return number
