"""Where a trajectory begins with tokens that were given to it, not sampled (`Given`): the start of its permit.

They lie in no turn, so they carry no loss and are in no ratio, length or sum; the model sees them as context.
"""

from __future__ import annotations

import re

from msgspec import Struct

from async_rl.trajectory.types import Trajectory

GIVEN = "start/given"
"""key of `Trajectory.info`, there where the permit has a start: the stretches, and ~ where the last is open"""
HINT = "start/hint"
"""key of `Trajectory.info`, there where the beginning of a text stands in the prompt instead: the share of it"""
OPEN = "window/open"
"""key of `Trajectory.info` of a piece of an episode (ended "window"): "turn" where it was cut within a turn,
"between" where behind one"""
_STRETCH = re.compile(r"(\d{1,9})\+(\d{1,9})")


class Given(Struct, frozen=True, kw_only=True):
    """Stretches of a trajectory that stand for turns of the policy and were not sampled."""

    stretches: tuple[tuple[int, int], ...] = ()
    """(start, length) in tokens; none: the start did not fit the episode"""
    open: bool = False
    """the policy went on within the last one"""

    def write(self) -> str:
        """As text: `12+5,30+7~`."""
        return ",".join(f"{start}+{length}" for start, length in self.stretches) + ("~" if self.open else "")

    @classmethod
    def read(cls, text: str) -> Given | None:
        """None for a text that says no such thing."""
        parts = text.removesuffix("~").split(",") if text.removesuffix("~") else []
        found = [_STRETCH.fullmatch(part) for part in parts]
        if any(match is None for match in found) or (text.endswith("~") and not parts):
            return None
        stretches = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
        return cls(stretches=stretches, open=text.endswith("~"))


def given_in(trajectory: Trajectory) -> Given | None:
    """What was given to a trajectory; None: its permit has no start."""
    text = trajectory.info.get(GIVEN)
    return Given.read(text) if isinstance(text, str) else None


def wrong_given(trajectory: Trajectory) -> str:
    """Why its stretches cannot be what was given to it; empty: they can."""
    text = trajectory.info.get(GIVEN)
    found = Given.read(text) if isinstance(text, str) else None
    if found is None:
        return f"what was given to it is {text!r:.60}"
    end = trajectory.contexts[0] if trajectory.contexts else len(trajectory.tokens)
    position = 0
    for start, length in found.stretches:
        if start < position or length < 1 or start + length > end:
            return f"a stretch at {start}+{length} is out of order or outside its first context"
        position = start + length
    sampled = [(turn.start, turn.start + turn.length) for turn in trajectory.turns if turn.length]
    if any(begin < start + length and start < stop for start, length in found.stretches for begin, stop in sampled):
        return "it samples what was given to it"
    return ""
