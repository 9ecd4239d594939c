"""Who sits in which cache slot, and the numbers of each running turn as arrays over slots."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from async_rl.generator.engine import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request's place in the arrays."""

    request: Request
    history: NDArray[np.int32]  # [tokens]
    """the request's tokens"""
    rule: int
    """number of its stop rule"""


class Slots:
    """`max_sequences` places. A place is free, running, or idle: between two turns of its session, kept
    until `release` or until a waiting request needs the place (least recently used first)."""

    def __init__(self, max_sequences: int, max_context: int) -> None:
        n = max_sequences
        # Pages of these are touched only as far as sequences reach.
        self.tokens = np.zeros((n, max_context), dtype=np.int32)
        self.log_probs = np.zeros((n, max_context), dtype=np.float32)
        self.versions = np.zeros((n, max_context), dtype=np.int32)
        self.known = np.zeros(n, dtype=np.int64)
        """tokens of history and turn so far"""
        self.cached = np.zeros(n, dtype=np.int64)
        """of these, tokens whose keys and values are in the cache"""
        self.turn_start = np.zeros(n, dtype=np.int64)
        self.limit = np.zeros(n, dtype=np.int64)
        """`known` at which the turn has to end"""
        self.temperature = np.ones(n, dtype=np.float32)
        self.seed = np.zeros(n, dtype=np.uint64)
        self.rule = np.zeros(n, dtype=np.int64)
        self.arrival = np.zeros(n, dtype=np.int64)
        self.running = np.zeros(n, dtype=bool)
        self.session = np.full(n, -1, dtype=object)
        self._max_context = max_context
        self._slot_of: dict[int, int] = {}
        self._free = list(range(n))
        self._idle: dict[int, None] = {}  # slots, least recently used first
        self._arrivals = 0

    def of(self, session: int) -> int | None:
        """The slot of a session, running or idle."""
        return self._slot_of.get(session)

    def take(self, session: int) -> int | None:
        """A slot for `session`: its own, a free one, or that of the least recently used idle session.
        None when every slot is running."""
        slot = self._slot_of.get(session)
        if slot is not None:
            return slot
        if not self._free and self._idle:
            self.clear(next(iter(self._idle)))
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._slot_of[session] = slot
        self.session[slot] = session
        self.cached[slot] = self.known[slot] = 0
        return slot

    def start(self, slot: int, turn: Turn) -> None:
        """Begin a turn. What is cached stays valid as far as the old history agrees with the new one."""
        request, history = turn.request, turn.history
        n = len(history)
        same = min(int(self.cached[slot]), n - 1)  # the last token is fed again: its logits are needed
        differs = np.flatnonzero(self.tokens[slot, :same] != history[:same])
        self.cached[slot] = differs[0] if len(differs) else same
        self.tokens[slot, :n] = history
        self.known[slot] = self.turn_start[slot] = n
        self.limit[slot] = min(n + request.params.max_tokens, self._max_context)
        self.temperature[slot] = request.params.temperature
        self.seed[slot] = request.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.rule[slot] = turn.rule
        self.arrival[slot] = self._arrivals
        self._arrivals += 1
        self.running[slot] = True
        self._idle.pop(slot, None)

    def end(self, slot: int) -> None:
        """The turn is over; the session keeps its place for the next one."""
        self.running[slot] = False
        self._idle[slot] = None

    def clear(self, slot: int) -> None:
        """Forget the session in `slot`."""
        self._slot_of.pop(self.session[slot])
        self._idle.pop(slot, None)
        self.session[slot] = -1
        self.running[slot] = False
        self.cached[slot] = self.known[slot] = 0
        heapq.heappush(self._free, slot)

    def new_tokens(self, slot: int) -> NDArray[np.int32]:
        """Tokens of the turn so far."""
        return self.tokens[slot, self.turn_start[slot] : self.known[slot]]

    def compaction(self) -> tuple[list[int], list[int]]:
        """Running slots to move down, and the slots below that are not running, pairwise."""
        running = np.flatnonzero(self.running)
        below = np.flatnonzero(~self.running[: len(running)])
        return running[len(running) - len(below) :].tolist(), below.tolist()

    def swap(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Exchange the sessions of slots `first[i]` and `second[i]`, with everything known of them."""
        here, there = [*first, *second], [*second, *first]
        used = int(self.known[here].max())
        for matrix in (self.tokens, self.log_probs, self.versions):
            matrix[here, :used] = matrix[there, :used]
        for column in (
            self.known,
            self.cached,
            self.turn_start,
            self.limit,
            self.temperature,
            self.seed,
            self.rule,
            self.arrival,
            self.running,
            self.session,
        ):
            column[here] = column[there]
        moved = dict(zip(there, here, strict=True))
        self._slot_of = {session: moved.get(slot, slot) for session, slot in self._slot_of.items()}
        self._idle = {moved.get(slot, slot): None for slot in self._idle}
        self._free = [moved.get(slot, slot) for slot in self._free]
        heapq.heapify(self._free)
