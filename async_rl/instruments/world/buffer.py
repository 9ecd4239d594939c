"""The buffer's process around the real state machine: rounds of messages, commit, answers. It can be killed in between.

With a store the effects are executed by the same function as in a run; without one nothing is written, and the batch
that the trainer gets is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, get_args

from msgspec.structs import replace

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.events import Event
from async_rl.instruments.world.clock import Link, Process
from async_rl.trajectory.beginnings import join_all
from async_rl.trajectory.codec import unpack
from async_rl.wire import messages as msg

TICK_S = 1.0
GATHER_S = 0.002
WRITES = frozenset(get_args(do.Write))


class WorldWatch:
    """What is seen of a world from outside. Watches derive from it."""

    def written(self, effects: Sequence[do.Effect]) -> None:
        """These were committed, or, without a store, decided."""

    def recorded(self, event: Event) -> None:
        """A row for events.jsonl (with a store only)."""

    def sent(self, message: msg.Message) -> None:
        """The buffer sends a message (with a store only)."""

    def loaded(self, pairs: Sequence[tuple[int, int]], found: Sequence[bytes]) -> None:
        """Saved turns of these (group, sample) were read from the store."""

    def round(self, core: Core) -> None:
        """A round is over in which something was decided (with a store only)."""

    def trained(self, step: int, batch: msg.Batch) -> None:
        """The trainer has taken a step."""

    def restored(self, core: Core, before: Core | None) -> None:
        """A new buffer has read the store. `before`: the state machine that wrote it, when all was committed."""


@cache
def _loop() -> ModuleType:
    from async_rl.buffer import loop  # sockets and SQLite, for those who have a store only

    return loop


class Killed(Exception):
    """The process is gone in the middle of something."""


@dataclass(eq=False, kw_only=True)
class SimulatedBuffer(Process):
    """One life of the buffer."""

    core: Core
    store: Any
    """None: nothing is written"""
    watch: WorldWatch
    ticks: bool
    """messages are handled in rounds, and time passes for the state machine without one, too"""
    killed: Callable[[Core | None], None]
    """called at the end of this life, with the state machine when all that it decided was committed"""
    failed: Callable[[str], None]
    """called when the buffer ends the run"""
    links: dict[bytes, Link] = field(default_factory=dict)
    inbox: list[tuple[bytes, msg.Message]] = field(default_factory=list)
    awake: bool = False
    doomed: bool = False
    """it is killed in the middle of the next round that writes something"""
    behind_s: float = 0.0
    """seconds by which the store's thread is behind the state machine; 0: a round is stored before the next one"""
    behind: list[list[do.Effect]] = field(default_factory=list)
    """rounds that are decided and not stored"""
    left: int = -1
    """writes, commits and answers until then; -1: it lives"""
    writes: list[do.Effect] = field(default_factory=list)
    """of this round"""
    committed: bool = True
    """all writes of this round"""

    def begin(self) -> None:
        if self.ticks:
            self.round()
            self.after(TICK_S, self.begin)

    def deliver(self, link: Link, message: msg.Message) -> None:
        """A message arrives."""
        if not self.alive:
            return
        self.links[link.identity] = link
        if not self.ticks:
            self.when_awake(lambda: self.execute(self.core.handle(link.identity, message, self.clock.now)))
            return
        self.inbox.append((link.identity, message))
        if not self.awake:
            self.awake = True
            self.after(self.clock.about(GATHER_S), self.round)

    def round(self) -> None:
        """Handle what has arrived."""
        self.awake = False
        taken, self.inbox = self.inbox, []
        effects: list[do.Effect] = []
        for peer, message in taken:
            effects += self.core.handle(peer, message, self.clock.now)
        effects += self.core.tick(self.clock.now)
        if not self.behind_s or not effects:
            self.execute(effects)
            return
        self.behind.append(effects)
        if len(self.behind) == 1:
            self.after(self.clock.about(self.behind_s), self.catch_up)

    def catch_up(self) -> None:
        """Store some of the rounds that wait, and answer them."""
        number = self.clock.random.randint(1, len(self.behind))
        some, self.behind = self.behind[:number], self.behind[number:]
        self.execute([effect for effects in some for effect in effects])
        if self.behind:
            self.after(self.clock.about(self.behind_s), self.catch_up)

    def finish(self) -> None:
        """Store all rounds that wait: the run is over."""
        some, self.behind = self.behind, []
        self.execute([effect for effects in some for effect in effects])

    @property
    def settled(self) -> Core | None:
        """The state machine, when all that it decided is committed."""
        return self.core if self.committed and not self.behind else None

    def execute(self, effects: Sequence[do.Effect]) -> None:
        if self.store is None:
            self._answer(effects)
        else:
            self._store_and_answer(effects)

    def _answer(self, effects: Sequence[do.Effect]) -> None:
        self.watch.written(effects)
        for effect in effects:
            match effect:
                case do.Send(peer=peer, message=message) if peer in self.links:
                    self.links[peer].answer(message)
                case do.SendBatch(peer=peer, step=step):
                    self.links[peer].answer(msg.Batch(step=step))
                case do.EndRun(reason=reason):
                    self.failed(reason)

    def _store_and_answer(self, effects: Sequence[do.Effect]) -> None:
        if not effects:
            return
        self.writes = [effect for effect in effects if type(effect) in WRITES]
        self.committed = not self.writes
        if self.doomed and self.writes:
            self.left = self.clock.random.randint(0, len(effects) + 2)
        try:
            _loop().execute(effects, Disk(self), Wire(self), self.watch.recorded, 1 << 30)
        except Killed:
            self.killed(self.settled)
            return
        if self.left >= 0:
            self.killed(self.settled)
        self.watch.round(self.core)

    def spend(self) -> None:
        """One more thing is done; raises Killed when that was one too many."""
        if self.left == 0:
            raise Killed
        self.left -= self.left > 0


@dataclass(eq=False)
class Disk:
    """The store as the process sees it."""

    buffer: SimulatedBuffer

    def commit(self) -> None:
        self.buffer.spend()
        self.buffer.store.commit()
        self.buffer.committed = True
        self.buffer.watch.written(self.buffer.writes)
        self.buffer.spend()

    def load_turns(self, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        found: list[bytes] = self.buffer.store.load_turns(pairs)
        self.buffer.watch.loaded(pairs, found)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("add_", "save_", "drop_", "refuse_", "form_", "mark_", "set_")):
            self.buffer.spend()
        return getattr(self.buffer.store, name)


@dataclass(eq=False)
class Wire:
    """The router as the process sees it."""

    buffer: SimulatedBuffer

    def send(self, peer: bytes, message: msg.Message) -> bool:
        self.buffer.spend()
        if isinstance(message, msg.Batch):
            message = replace(message, trajectories=tuple(map(unpack, join_all(message.blobs, 1 << 30))), blobs=())
        self.buffer.watch.sent(message)
        link = self.buffer.links.get(peer)
        if link is not None:
            link.answer(message)
        return link is not None
