"""Which processes live (`Presence`), and what follows when a generator joins, stands, freezes or leaves
(`Attendance`). What generators may start is in admission.py.

Everything here can come twice, late or not at all. A session of a generator has a number of its own; totals only grow
within it; and the state that it sends several times a second shows what was lost on the way. So no order of arrival
does harm, and whatever is missing is sent again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from msgspec.structs import replace

from async_rl.buffer import effects as do
from async_rl.buffer.admission import RESEND_S, Admission
from async_rl.buffer.verification import of_the_launcher
from async_rl.events import GeneratorJoined, GeneratorLeft, GeneratorLost
from async_rl.wire import messages as msg

PULSE = msg.PULSE.encode()
UNKNOWN_PLACE = "unknown place on a joined generator"
LONGEST_HOST = 200
"""characters"""
_PLACE = re.compile(r"; held up for [\d.]+ s in (\S+\.py:\d+ \S+)")
"""where the code stands, in the words of a pulse (wire/heartbeat.py)"""
_RANK = re.compile(r"trainer-rank-[1-9]\d{0,3}")
"""1,024 ranks at most (trainer.ranks): so many states there can be"""


@dataclass(slots=True, kw_only=True)
class PeerState:
    """What was last received from one process. Times are the buffer's clock, seconds."""

    name: str
    role: str
    pid: int
    doing: str
    since: float
    """when it began that"""
    heard: float
    """when its last message of any kind came"""
    group: int = -1
    """whose code it ran then; -1: none, as far as is known"""
    host: str = ""
    """name of its machine, where it was started from outside"""


@dataclass(slots=True)
class Presence:
    """The generators, the trainer and its ranks on other machines, by their peer; other processes are not kept."""

    limit_s: float
    """wire.frozen_after_s: silence after which a process is taken for frozen"""
    states: dict[bytes, PeerState] = field(default_factory=dict)
    checked: float = 0.0
    """when `frozen` was last called; 0: never"""

    def add(self, peer: bytes, hello: msg.Hello, now: float) -> None:
        """From now on this process is watched."""
        self.states[peer] = PeerState(
            name=hello.name, role=hello.role, pid=hello.pid, doing="saying hello", since=now, heard=now
        )

    def remove(self, peer: bytes) -> None:
        self.states.pop(peer, None)

    def knows(self, peer: bytes) -> bool:
        return peer.removesuffix(PULSE) in self.states

    def receive(self, peer: bytes, message: msg.Message, now: float) -> None:
        """Any message shows that its sender lives; a pulse says what the process does."""
        state = self.states.get(peer.removesuffix(PULSE))
        if state is None:
            if not isinstance(message, msg.Pulse) or not _is_rank(peer, message):
                return
            state = self.states[peer.removesuffix(PULSE)] = PeerState(
                name=message.name, role=msg.RANK, pid=message.pid, doing="", since=now, heard=now
            )
        state.heard = now
        if isinstance(message, msg.Pulse):
            state.doing, state.since, state.group = message.doing, now - message.since_s, message.group
            state.host = message.host[:LONGEST_HOST]
            if state.role == msg.RANK:
                state.pid = message.pid

    def frozen(self, now: float) -> list[bytes]:
        """The peers that have been silent for too long. When the buffer itself was stopped meanwhile, it received
        nothing from anybody: then nobody's silence counts."""
        if self.checked and now - self.checked > self.limit_s / 2:
            for state in self.states.values():
                state.heard = now
        self.checked = now
        return [peer for peer, state in self.states.items() if now - state.heard > self.limit_s]

    def started_outside(self) -> list[bytes]:
        """Sockets for pulses of the trainer's ranks that somebody else than the launcher has started."""
        return [peer + PULSE for peer, state in self.states.items() if state.host]

    def silent_s(self, peer: bytes, now: float) -> float:
        """Seconds since the peer's last message."""
        state = self.states.get(peer)
        return now - state.heard if state is not None else 0.0

    def describe(self, peer: bytes, now: float) -> str:
        """Example: `last heard of generator-1 0.3 s ago: decoding 14 sequences (for 3.2 s)`."""
        state = self.states.get(peer)
        if state is None:
            return "nothing was heard of it"
        return (
            f"last heard of {state.name} {now - state.heard:.1f} s ago: {state.doing} (for {now - state.since:.1f} s)"
        )

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
                host=s.host,
            )
            for s in self.states.values()
        ]


def _is_rank(peer: bytes, pulse: msg.Pulse) -> bool:
    """Whether a follower among the trainer's ranks sends this. Ranks say no Hello: rank 0 speaks for all."""
    named = _RANK.fullmatch(pulse.name)
    return pulse.role == msg.RANK and named is not None and peer == pulse.name.encode() + PULSE


@dataclass(slots=True, kw_only=True)
class Attendance:
    """Generators join, report and leave. The answers carry no permits: the caller grants afterwards."""

    admission: Admission
    presence: Presence
    welcome: msg.Welcome | None = None
    """what a generator that joins by itself is told; None: it gets no answer"""

    def join(self, peer: bytes) -> list[do.Effect]:
        """A generator asks whether it may join."""
        return [] if self.welcome is None else [do.Send(peer=peer, message=self.welcome)]

    def hello(self, peer: bytes, hello: msg.Hello, *, published: int, now: float) -> list[do.Effect]:
        """A new session begins, unless this one has begun already."""
        out: list[do.Effect] = []
        if not hello.session or self.admission.known(peer, hello.session) is None:
            self.remove(peer)
            self.admission.add(peer, hello, now)
            self.presence.add(peer, hello, now)
            if hello.joined:
                out.append(do.Note(event=GeneratorJoined(name=hello.name, pid=hello.pid)))
        return [*out, do.Send(peer=peer, message=msg.NewWeights(version=published))]

    def remove(self, peer: bytes) -> bool:
        """The generator is gone, and what it held is free for others; False when there was none."""
        self.presence.remove(peer)
        return self.admission.remove(peer)

    def leave(self, peer: bytes, leave: msg.Leave) -> list[do.Effect]:
        """A generator ends by itself."""
        generator = self.admission.generators[peer]
        left = GeneratorLeft(name=generator.name, groups=tuple(sorted(generator.groups)), reason=leave.reason)
        self.remove(peer)
        return [do.Note(event=left)]

    def gone(self, gone: msg.Gone) -> list[do.Effect]:
        """The launcher saw this process end."""
        for peer, generator in list(self.admission.generators.items()):
            if (generator.name, generator.pid) == (gone.name, gone.pid):
                self.remove(peer)
        return []

    def remove_frozen(self, now: float) -> tuple[list[do.Effect], list[msg.Gone]]:
        """Give up the generators that have been silent for too long: all of them, before what they held is given to
        others. Also returns those that joined by themselves and ran code of a task when they were heard last: nobody
        else tells of them where their host is gone."""
        out: list[do.Effect] = []
        gone: list[msg.Gone] = []
        for peer in self.presence.frozen(now):
            if (generator := self.admission.generators.get(peer)) is None:
                continue  # without a trainer nothing goes on: the launcher sees to that
            lost = GeneratorLost(
                name=generator.name,
                groups=tuple(sorted(generator.groups)),
                silent_s=round(self.presence.silent_s(peer, now), 3),
                reason=self.presence.describe(peer, now),
            )
            state = self.presence.states[peer]
            if state.group in generator.groups and not of_the_launcher(generator.name):
                place = _PLACE.search(state.doing)
                reason = f"{generator.name} fell silent; {lost.reason}"
                told = place[1] if place is not None else UNKNOWN_PLACE
                gone.append(
                    msg.Gone(name=generator.name, pid=generator.pid, reason=reason, groups=(state.group,), place=told)
                )
            self.remove(peer)
            self.admission.counts["generators_frozen"] += 1
            out.append(do.Note(event=lost))
        return out, gone

    def canary(self, peer: bytes, canary: msg.Canary, trainer: bytes) -> list[do.Effect]:
        """Pass a canary on to the trainer, which compares."""
        if not trainer:
            self.admission.counts["canaries_ignored"] += 1
            return []
        name = self.admission.generators[peer].name
        return [do.Send(peer=trainer, message=replace(canary, name=name))]

    def want(self, peer: bytes, want: msg.Want | msg.Status) -> None:
        """Take in what a generator wants and holds; totals only grow."""
        generator = self.admission.generators[peer]
        generator.limit = max(generator.limit, want.limit)
        generator.version = max(generator.version, want.version)

    def status(self, peer: bytes, status: msg.Status, *, published: int, now: float) -> list[do.Effect]:
        """Compare what a generator has with what it should have; send again what was lost."""
        self.want(peer, status)
        generator = self.admission.generators[peer]
        generator.busy_seconds = status.busy_seconds
        generator.task_seconds = status.task_seconds
        generator.tokens_generated = status.tokens_generated
        generator.running = status.running
        out = self.admission.resend(peer, set(status.groups), now)
        if generator.version < published and now - generator.notified >= RESEND_S:
            generator.notified = now
            out.append(do.Send(peer=peer, message=msg.NewWeights(version=published)))
        return out
