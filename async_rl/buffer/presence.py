"""Generators come, stand, freeze, leave: what follows from each. What they may start is in admission.py.

Everything here can come twice, late or not at all. A life of a generator has a number of its own (its
session); totals only grow within it; and the standing that it sends several times a second shows what got
lost on the way. So no order of arrival does harm, and whatever is missing is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from async_rl.buffer import effects as do
from async_rl.buffer.admission import AGAIN_S, Admission
from async_rl.events import GeneratorJoined, GeneratorLeft, GeneratorLost
from async_rl.wire import messages as msg

# -------------------- presence
# Who lives, by what was last heard of each process; and whether the buffer itself was away meanwhile.

PULSE = msg.PULSE.encode()


@dataclass(slots=True, kw_only=True)
class Sign:
    """The last sign of life of one process."""

    name: str
    role: str
    pid: int
    doing: str
    since: float
    """when it began that, the buffer's clock"""
    heard: float
    """when its last message of any kind came"""


@dataclass(slots=True)
class Presence:
    """Signs of the generators and the trainer, by their peer. Others are forgotten at once."""

    limit_s: float
    """silence after which a process is taken for frozen"""
    signs: dict[bytes, Sign] = field(default_factory=dict)
    ticked: float = 0.0
    """when the buffer last looked; 0: never"""

    def join(self, peer: bytes, hello: msg.Hello, now: float) -> None:
        """From here on its signs are kept."""
        self.signs[peer] = Sign(
            name=hello.name, role=hello.role, pid=hello.pid, doing="saying hello", since=now, heard=now
        )

    def leave(self, peer: bytes) -> None:
        self.signs.pop(peer, None)

    def knows(self, peer: bytes) -> bool:
        return peer.removesuffix(PULSE) in self.signs

    def hear(self, peer: bytes, message: msg.Message, now: float) -> None:
        """Any message is a sign of life; a pulse says what the process does."""
        sign = self.signs.get(peer.removesuffix(PULSE))
        if sign is None:
            return
        sign.heard = now
        if isinstance(message, msg.Pulse):
            sign.doing, sign.since = message.doing, now - message.since_s

    def frozen(self, now: float) -> list[bytes]:
        """The peers that have been silent for too long. When the buffer itself was away it has heard nobody:
        all get their time anew."""
        if self.ticked and now - self.ticked > self.limit_s / 2:
            for sign in self.signs.values():
                sign.heard = now
        self.ticked = now
        return [peer for peer, sign in self.signs.items() if now - sign.heard > self.limit_s]

    def silent_s(self, peer: bytes, now: float) -> float:
        sign = self.signs.get(peer)
        return now - sign.heard if sign is not None else 0.0

    def last_word(self, peer: bytes, now: float) -> str:
        """Example: `last heard of generator-1 0.3 s ago: decoding 14 sequences (for 3.2 s)`."""
        sign = self.signs.get(peer)
        if sign is None:
            return "nothing was heard of it"
        return f"last heard of {sign.name} {now - sign.heard:.1f} s ago: {sign.doing} (for {now - sign.since:.1f} s)"

    def rows(self, now: float) -> list[msg.ProcessState]:
        """One row a process."""
        return [
            msg.ProcessState(
                name=s.name,
                role=s.role,
                pid=s.pid,
                doing=s.doing,
                since_s=round(now - s.since, 3),
                silent_s=round(now - s.heard, 3),
            )
            for s in self.signs.values()
        ]


@dataclass(slots=True, kw_only=True)
class Attendance:
    """Answers carry no permits: whoever calls grants afterwards."""

    admission: Admission
    presence: Presence
    welcome: msg.Welcome | None = None
    """what a generator that joins by itself is told; None: it gets no answer"""

    def knock(self, peer: bytes) -> list[do.Effect]:
        """One that may join asks."""
        return [] if self.welcome is None else [do.Send(peer=peer, message=self.welcome)]

    def hello(self, peer: bytes, hello: msg.Hello, *, published: int, now: float) -> list[do.Effect]:
        """A new life begins, unless this one has begun already."""
        out: list[do.Effect] = []
        if not hello.session or self.admission.known(peer, hello.session) is None:
            self.lost(peer)
            self.admission.join(peer, hello, now)
            self.presence.join(peer, hello, now)
            if hello.joined:
                out.append(do.Note(event=GeneratorJoined(name=hello.name, pid=hello.pid)))
        return [*out, do.Send(peer=peer, message=msg.NewWeights(version=published))]

    def lost(self, peer: bytes) -> bool:
        """It is gone and what it held is free for others; False when there was none."""
        self.presence.leave(peer)
        return self.admission.lost(peer)

    def leave(self, peer: bytes, leave: msg.Leave) -> list[do.Effect]:
        generator = self.admission.generators[peer]
        left = GeneratorLeft(name=generator.name, groups=tuple(sorted(generator.groups)), reason=leave.reason)
        self.lost(peer)
        return [do.Note(event=left)]

    def gone(self, gone: msg.Gone) -> list[do.Effect]:
        """The launcher saw that life end."""
        for peer, generator in list(self.admission.generators.items()):
            if (generator.name, generator.pid) == (gone.name, gone.pid):
                self.lost(peer)
        return []

    def frozen(self, now: float) -> list[do.Effect]:
        """Give up the generators of which nothing comes any more: all of them, before what they held is given."""
        out: list[do.Effect] = []
        for peer in self.presence.frozen(now):
            if (generator := self.admission.generators.get(peer)) is None:
                continue  # without a trainer nothing goes on: the launcher sees to that
            lost = GeneratorLost(
                name=generator.name,
                groups=tuple(sorted(generator.groups)),
                silent_s=round(self.presence.silent_s(peer, now), 3),
                reason=self.presence.last_word(peer, now),
            )
            self.lost(peer)
            self.admission.counts["generators_frozen"] += 1
            out.append(do.Note(event=lost))
        return out

    def canary(self, peer: bytes, canary: msg.Canary, trainer: bytes) -> list[do.Effect]:
        """The trainer compares."""
        if not trainer:
            self.admission.counts["canaries_ignored"] += 1
            return []
        name = self.admission.generators[peer].name
        return [do.Send(peer=trainer, message=replace(canary, name=name))]

    def want(self, peer: bytes, want: msg.Want | msg.Status) -> None:
        """Totals only grow."""
        generator = self.admission.generators[peer]
        generator.limit = max(generator.limit, want.limit)
        generator.version = max(generator.version, want.version)

    def status(self, peer: bytes, status: msg.Status, *, published: int, now: float) -> list[do.Effect]:
        """Compare what a generator has with what it should have; send again what got lost."""
        self.want(peer, status)
        generator = self.admission.generators[peer]
        generator.busy_seconds = status.busy_seconds
        generator.tokens_generated = status.tokens_generated
        generator.running = status.running
        out = self.admission.again(peer, set(status.groups), now)
        if generator.version < published and now - generator.told >= AGAIN_S:
            generator.told = now
            out.append(do.Send(peer=peer, message=msg.NewWeights(version=published)))
        return out
