"""The buffer's process around the real state machine: rounds, commit, answers; killed between any two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from support_sim_clock import Link, Process

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.loop import carry_out
from async_rl.trajectory.codec import unpack
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from support_sim_run import Run

TICK_S = 1.0


@dataclass(eq=False, kw_only=True)
class Buffer(Process):
    """The process around the state machine: rounds of messages, commit, only then answers."""

    run: Run
    core: Core
    store: Any
    links: dict[bytes, Link] = field(default_factory=dict)
    inbox: list[tuple[bytes, msg.Message]] = field(default_factory=list)
    awake: bool = False
    doomed: bool = False
    """it is killed in the middle of the next round that writes something"""
    left: int = -1
    """writes, commits and answers until then; -1: it lives"""
    writes: list[do.Effect] = field(default_factory=list)
    """of this round"""

    def begin(self) -> None:
        self.round()
        self.after(TICK_S, self.begin)

    def receive(self, link: Link, message: msg.Message) -> None:
        if not self.alive:
            return
        self.links[link.identity] = link
        self.inbox.append((link.identity, message))
        if not self.awake:
            self.awake = True
            self.after(self.clock.about(0.002), self.round)

    def round(self) -> None:
        self.awake = False
        taken, self.inbox = self.inbox, []
        effects: list[do.Effect] = []
        for peer, message in taken:
            effects += self.core.handle(peer, message, self.clock.now)
        effects += self.core.tick(self.clock.now)
        self.carry_out(effects)

    def carry_out(self, effects: Sequence[do.Effect]) -> None:
        self.writes = [effect for effect in effects if isinstance(effect, do.Write)]
        if self.doomed and self.writes:
            self.left = self.clock.random.randint(0, len(effects) + 2)
        try:
            carry_out(effects, Disk(self), Wire(self), self.run.watch.noted, part_bytes=1 << 30)  # type: ignore[arg-type]
        except Killed:
            self.run.fall()
            return
        if self.left >= 0:
            self.run.fall()
        self.run.watch.slots(self.core)

    def spend(self) -> None:
        """One more thing done; raises Killed when that was one too many."""
        if self.left == 0:
            raise Killed
        self.left -= self.left > 0


class Killed(Exception):
    """The process is gone in the middle of something."""


@dataclass(eq=False)
class Disk:
    """The store as the process sees it."""

    buffer: Buffer

    def commit(self) -> None:
        self.buffer.spend()
        self.buffer.store.commit()
        self.buffer.run.watch.committed(self.buffer.writes)
        self.buffer.spend()

    def load_turns(self, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        found: list[bytes] = self.buffer.store.load_turns(pairs)
        stored = self.buffer.run.watch.stored
        assert len(found) == len(pairs) or stored.issuperset(pairs), "turns that were begun are in the store"
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("add_", "save_", "drop_", "refuse_", "form_", "mark_")):
            self.buffer.spend()
        return getattr(self.buffer.store, name)


@dataclass(eq=False)
class Wire:
    """The router as the process sees it."""

    buffer: Buffer

    def send(self, peer: bytes, message: msg.Message) -> bool:
        self.buffer.spend()
        if isinstance(message, msg.Batch):
            message = replace(message, trajectories=tuple(map(unpack, message.blobs)), blobs=())
            self.buffer.run.watch.sent(message.step, message.trajectories)
        self.buffer.run.watch.told(message)
        link = self.buffer.links.get(peer)
        if link is not None:
            link.answer(message)
        return link is not None
