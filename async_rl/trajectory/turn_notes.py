"""Notes on the turns of a trajectory and on their tokens, as columns by name: how the codec writes and reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from async_rl.trajectory.parts import POOL_PREFIX
from async_rl.trajectory.types import Turn

LARGEST = 3e38
"""of a note; a float32 holds it"""
MOST_NAMES = 64
"""names of notes on the turns and tokens of one trajectory"""


def noted_turn(turn: Turn, key: str, value: float) -> Turn:
    """`turn` with a note; one of the same name is replaced. Raises ValueError for what no note can hold."""
    notes = dict(turn.notes) | {sendable(key): _finite(key, value)}
    _refuse_many(notes)
    return replace(turn, notes=tuple(sorted(notes.items())))


def noted_tokens(turn: Turn, key: str, values: Sequence[float]) -> Turn:
    """`turn` with a note on each of its tokens; alike."""
    if len(values) != turn.length:
        raise ValueError(f"note '{key}' has {len(values)} numbers for a turn of {turn.length} tokens")
    numbers = tuple(np.asarray([_finite(key, value) for value in values], np.float32).tolist())
    notes = dict(turn.token_notes) | {sendable(key): numbers}
    _refuse_many(notes)
    return replace(turn, token_notes=tuple(sorted(notes.items()))) if turn.length else turn


def sendable(text: str) -> str:
    """`text` without half surrogate pairs, which no message can carry."""
    return str(text).encode("utf-8", "replace").decode()


def note_name(key: str) -> str:
    """The name of a note on an episode. Raises ValueError for what the experience pool notes itself."""
    if key.startswith(POOL_PREFIX):
        raise ValueError(f"a note cannot be called {key!r}: {POOL_PREFIX}... is what the experience pool notes")
    return sendable(key)


def _finite(key: str, value: float) -> float:
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"note '{key}' is {number}; it must be a finite number")
    return number


def _refuse_many(notes: Mapping[str, object]) -> None:
    if len(notes) > MOST_NAMES // 2:
        raise ValueError(f"more than {MOST_NAMES // 2} notes on one turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """Which notes the turns of a trajectory have."""

    turn_names: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Notes:
        """Every name once, in order."""
        return cls(
            turn_names=tuple(sorted({name for turn in turns for name, _ in turn.notes})),
            token_names=tuple(sorted({name for turn in turns for name, _ in turn.token_notes})),
        )

    def of_turns(self, turns: Sequence[Turn]) -> bytes:
        """A column f8[turns] for each name, NaN where a turn has none."""
        found = np.full((len(self.turn_names), len(turns)), np.nan)
        place = {name: i for i, name in enumerate(self.turn_names)}
        for number, turn in enumerate(turns):
            for name, value in turn.notes:
                found[place[name], number] = value
        return found.tobytes()

    def of_tokens(self, turns: Sequence[Turn], length: int, *, dense: bool) -> bytes:
        """A column f4[length] for each name, NaN where there is none. `dense`: of all tokens, else of the turns'."""
        found = np.full((len(self.token_names), length), np.nan, np.float32)
        place = {name: i for i, name in enumerate(self.token_names)}
        begin = 0
        for turn in turns:
            begin = turn.start if dense else begin
            for name, values in turn.token_notes:
                found[place[name], begin : begin + turn.length] = values
            begin += turn.length
        return found.tobytes()

    def put(
        self, turns: Sequence[Turn], of_turns: Sequence[Sequence[float]], of_tokens: Sequence[NDArray[np.float32]]
    ) -> tuple[Turn, ...]:
        """The turns with their notes. of_tokens: of all tokens of the trajectory, [tokens] each."""
        made = []
        for number, turn in enumerate(turns):
            place = slice(turn.start, turn.start + turn.length)
            notes = [
                (name, column[number])
                for name, column in zip(self.turn_names, of_turns, strict=True)
                if column[number] == column[number]  # not NaN
            ]
            each = [(name, column[place]) for name, column in zip(self.token_names, of_tokens, strict=True)]
            token_notes = [(name, tuple(values.tolist())) for name, values in each if not np.isnan(values).all()]
            made.append(replace(turn, notes=tuple(notes), token_notes=tuple(token_notes)))
        return tuple(made)
