"""The sequences of the embedded engine: which session holds which slot, and the numbers of its turn."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from async_rl.generator.engine import Request
from async_rl.generator.kv_blocks import BlockTables, Ints

FEW_RESUMED = 4
"""turns: so few begin sooner one by one"""
_SEED = 0xFFFF_FFFF_FFFF_FFFF


class CheckedRequest(Struct, frozen=True, kw_only=True, gc=False):
    """A request that can be sampled: its tokens, and its stop rule."""

    request: Request
    history: NDArray[np.int32] | list[int]  # [tokens]
    """of the request; a list where it goes on from `known` tokens: those behind them"""
    rule: int
    """number of its stop rule (sampling.StopRules)"""
    known: int = 0
    """tokens that the session's slot holds already"""


class Slots:
    """Which session holds which slot, and the numbers of its turn, as arrays over slots.

    A slot is free, running, or idle: between two turns of its session, kept until `release` or until a waiting request
    needs the slot, or a running one its blocks of the cache (least recently used first).
    """

    def __init__(self, max_sequences: int, max_context: int, tables: BlockTables) -> None:
        n = max_sequences
        self.tables = tables
        # [slots, max_context]; the memory is touched only as far as sequences reach
        self.tokens = np.zeros((n, max_context), dtype=np.int32)
        self.log_probs = np.zeros((n, max_context), dtype=np.float32)
        self.versions = np.zeros((n, max_context), dtype=np.int32)
        # [slots]
        self.known = np.zeros(n, dtype=np.int64)
        """tokens of history and turn so far"""
        self.turn_start = np.zeros(n, dtype=np.int64)
        self.limit = np.zeros(n, dtype=np.int64)
        """`known` at which the turn has to end"""
        self.temperature = np.ones(n, dtype=np.float32)
        self.seed = np.zeros(n, dtype=np.uint64)
        self.rule = np.zeros(n, dtype=np.int64)
        self.arrival = np.zeros(n, dtype=np.int64)
        self.running = np.zeros(n, dtype=bool)
        self.session = np.full(n, -1, dtype=object)
        self.held: list[list[int]] = [[] for _ in range(n)]
        """tokens of a slot, those of its turn once that has ended; empty: not known as a list"""
        self.resumed: dict[int, CheckedRequest] = {}
        """slots whose session goes on from all that they hold, in order of arrival, until `start_resumed`"""
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
        if not self._free:
            self.forget_idle()
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._slot_of[session] = slot
        self.session[slot] = session
        self.known[slot] = 0
        return slot

    def start(self, slot: int, checked: CheckedRequest) -> None:
        """Begin a turn, before which the cache is cut back to what the old history has in common with the new one."""
        request = checked.request
        n = checked.known + len(checked.history)
        self.tokens[slot, checked.known : n] = checked.history
        self.known[slot] = self.turn_start[slot] = n
        self.limit[slot] = min(n + request.params.max_tokens, self._max_context)
        self.temperature[slot] = request.params.temperature
        self.seed[slot] = request.seed & _SEED
        self.rule[slot] = checked.rule
        self.arrival[slot] = self._arrivals
        self._arrivals += 1
        self.running[slot] = True
        self.held[slot] = request.tokens.copy() if type(request.tokens) is list else []
        self._idle.pop(slot, None)

    def resume(self, slot: int, checked: CheckedRequest) -> None:
        """Have an idle slot go on from all that it holds, with the others that do before the next step."""
        self.resumed[slot] = checked
        self._idle.pop(slot, None)

    def start_resumed(self) -> None:
        """Begin the turns of all slots that were resumed."""
        resumed = self.resumed
        if len(resumed) > FEW_RESUMED:
            self._start_at_once(np.array([*resumed]), [*resumed.values()])
        else:
            for slot, checked in resumed.items():
                self.start(slot, checked)
        resumed.clear()

    def _start_at_once(self, slot: Ints, checked: Sequence[CheckedRequest]) -> None:
        """As `start`, of several slots [n] that are resumed: one after another each takes five times as long."""
        known, count = self.known[slot], np.array([len(one.history) for one in checked])
        row = np.repeat(np.arange(len(slot)), count)
        column = np.arange(len(row)) + (known - (count.cumsum() - count))[row]
        self.tokens[slot[row], column] = [*chain.from_iterable([one.history for one in checked])]
        known += count
        requests, most = [one.request for one in checked], self._max_context
        new = [request.params.max_tokens for request in requests]
        self.known[slot] = self.turn_start[slot] = known
        self.limit[slot] = np.minimum(known + [n if n < most else most for n in new], most)
        self.temperature[slot] = [request.params.temperature for request in requests]
        self.seed[slot] = np.array([request.seed & _SEED for request in requests], dtype=np.uint64)
        self.rule[slot] = [one.rule for one in checked]
        self.arrival[slot] = np.arange(self._arrivals, self._arrivals + len(slot))
        self._arrivals += len(slot)
        self.running[slot] = True
        for number, one in zip(slot.tolist(), checked, strict=True):
            self.held[number] += one.history

    def in_common(self, slot: int, history: NDArray[np.int32]) -> int:
        """How many cached tokens of a slot are the first ones of `history`."""
        same = min(int(self.tables.cached[slot]), len(history))
        if self.tokens[slot, :same].tobytes() == history[:same].tobytes():
            return same
        differs = np.flatnonzero(self.tokens[slot, :same] != history[:same])
        return int(differs[0])

    def goes_on(self, slot: int, tokens: Sequence[int]) -> int:
        """How many tokens of an idle slot `tokens` begins with: all, or 0. To compare lists takes a tenth of what it
        takes to make an array of one."""
        held = self.held[slot]
        n = len(held)
        return n if n and type(tokens) is list and n < len(tokens) and tokens[:n] == held else 0

    def end(self, slot: Ints) -> None:
        """End the turns of these slots [n]; the sessions keep them for the next ones."""
        self.running[slot] = False
        self._idle.update(dict.fromkeys(slot.tolist()))

    def hold(self, slot: Ints, turns: Sequence[Sequence[int]]) -> None:
        """Note the turns [n] of slots [n], which end now."""
        for number, turn in zip(slot.tolist(), turns, strict=True):
            if held := self.held[number]:
                held += turn

    def clear(self, slot: int) -> None:
        """Forget the session in `slot`."""
        self._slot_of.pop(self.session[slot])
        self._idle.pop(slot, None)
        self.resumed.pop(slot, None)
        self.session[slot] = -1
        self.held[slot] = []
        self.running[slot] = False
        self.known[slot] = 0
        self.tables.clear(slot)
        heapq.heappush(self._free, slot)

    def forget_idle(self) -> bool:
        """Forget the least recently used idle session. False when there is none."""
        if not self._idle:
            return False
        self.clear(next(iter(self._idle)))
        return True

    def new_tokens(self, slot: int) -> NDArray[np.int32]:
        """Tokens of the turn so far, [new tokens]."""
        return self.tokens[slot, self.turn_start[slot] : self.known[slot]]

    def by_arrival(self) -> Ints:
        """Running slots, oldest request first."""
        slot = np.flatnonzero(self.running)
        return slot[np.argsort(self.arrival[slot], kind="stable")]
