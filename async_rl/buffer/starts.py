"""Stored answers as beginnings of others: from a trajectory to what a permit says of it (`start_from`).

A success is given up to a share of its tokens, a failure up to its error: the first turn that the task noted with a
positive `error` (`Session.note_turn`), that turn included; without such a note it is treated as a success. A piece of
an episode that goes on is given whole, with what was given to it. Only whole turns are followed by what the environment
says, which the environment itself says again.
"""

from __future__ import annotations

from typing import Protocol

import msgpack
from msgspec.structs import replace

from async_rl.buffer.sampler import StartChoice
from async_rl.buffer.windows import SOURCE
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack
from async_rl.trajectory.given import OPEN, given_in
from async_rl.wire import messages as msg

MOST_BYTES = 1 << 20
"""of the starts in one message, if they are several"""
ERROR = "error"
"""note of the turn in which a failed episode went wrong"""


class StartReader(Protocol):
    """The store, as far as starts need it."""

    def load_one(self, group: int, sample: int) -> bytes | None:
        """Blob of a trajectory, or None."""
        ...

    def load_start(self, group: int) -> bytes | None:
        """What was stored of a group's start, or None."""
        ...


def start_from(trajectory: Trajectory, chosen: StartChoice) -> msg.Start:
    """What a permit says of an answer that others are to begin with."""
    if chosen.source == SOURCE:
        return _piece(trajectory, chosen)
    end = trajectory.contexts[0] if trajectory.contexts else len(trajectory.tokens)
    turns = [(turn.start, turn.length) for turn in trajectory.turns if turn.length and turn.start < end]
    given: list[tuple[int, int]] = []
    is_open = False
    error = _error(trajectory) if chosen.source == "failure" else None
    if error is not None:
        given = turns[: error + 1]
    else:
        left = int(chosen.share * sum(length for _, length in turns))
        for start, length in turns:
            if left <= 0:
                break
            given.append((start, min(length, left)))
            is_open = left < length
            left -= length
    cut = given[-1][0] + given[-1][1] if given else 0
    tokens = trajectory.tokens[:cut].astype("<i4").tobytes()
    return msg.Start(source=chosen.source, share=chosen.share, tokens=tokens, turns=tuple(given), open=is_open)


def _piece(trajectory: Trajectory, chosen: StartChoice) -> msg.Start:
    """All turns of an episode that was cut: those given to its last piece, and those that it sampled."""
    given = given_in(trajectory)
    turns = [] if given is None else list(given.stretches)
    sampled = [(turn.start, turn.length) for turn in trajectory.turns if turn.length]
    if given is not None and given.open and sampled:  # it went on within the last turn that was given
        (start, length), (_, more) = turns.pop(), sampled.pop(0)
        turns.append((start, length + more))
    turns += sampled
    end = sum(turns[-1])
    return msg.Start(
        source=chosen.source,
        share=chosen.share,
        group=chosen.group,
        tokens=trajectory.tokens[:end].astype("<i4").tobytes(),
        turns=tuple(turns),
        open=trajectory.info.get(OPEN) == "turn",
    )


def _error(trajectory: Trajectory) -> int | None:
    """Number of the first turn in which something went wrong, among those with tokens; None: the task noted none."""
    spoken = [turn for turn in trajectory.turns if turn.length]
    return next((n for n, turn in enumerate(spoken) if dict(turn.notes).get(ERROR, 0.0) > 0), None)


def read_start(store: StartReader, chosen: StartChoice | None) -> bytes | None:
    """What is to be stored of a decision's start; None where it is none from a stored answer. An answer that is not
    there any more gives an empty start."""
    if chosen is None or chosen.group < 0:
        return None
    blob = store.load_one(chosen.group, chosen.sample)
    start = msg.Start(source=chosen.source, share=chosen.share)
    if blob is not None:
        start = start_from(unpack(blob), chosen)
    packed: bytes = msgpack.packb([start.tokens, start.turns, start.open])
    return packed


def given_tokens(stored: bytes) -> tuple[bytes, tuple[tuple[int, int], ...], bool]:
    """(tokens, turns, whether the last one is open) of what `read_start` gave."""
    tokens, turns, is_open = msgpack.unpackb(stored)
    return tokens, tuple((start, length) for start, length in turns), is_open


def with_starts(permits: msg.Permits, store: StartReader) -> list[msg.Permits]:
    """The permits with the tokens of stored answers that their groups start from; in several messages where those are
    long."""
    if all(permit.start is None or permit.start.field for permit in permits.permits):
        return [permits]
    parts: list[list[msg.Permit]] = []
    room = 0
    for permit in permits.permits:
        filled = _filled(permit, store)
        size = len(filled.start.tokens) if filled.start is not None else 0
        if not parts or size > room:
            parts.append([])
            room = MOST_BYTES
        room -= size
        parts[-1].append(filled)
    return [replace(permits, permits=tuple(part)) for part in parts]


def _filled(permit: msg.Permit, store: StartReader) -> msg.Permit:
    if permit.start is None or (stored := store.load_start(permit.group)) is None:
        return permit
    tokens, turns, is_open = given_tokens(stored)
    return replace(permit, start=replace(permit.start, tokens=tokens, turns=turns, open=is_open))
