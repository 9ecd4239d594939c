"""A generator without an engine: the conversation of generator/loop.py around a decoder that takes time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from async_rl.generator.outbox import RESEND_S, Outbox
from async_rl.instruments.world.clock import Link, Process
from async_rl.instruments.world.times import Times
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg
from async_rl.wire.frames import HARMLESS

STATUS_S = 1.0
LONGEST_WAIT_S = 600.0
"""for an acknowledgement; a longer one is a hang. Repeated after 3, 6, 12, ... seconds, a message may well be lost six
times where three in ten are lost each way"""
Pair = tuple[int, int]
"""(group, sample)"""


class SimulatedDecoder(Protocol):
    """The episodes of one generator. What ends is given to `SimulatedGenerator.ended`."""

    @property
    def running(self) -> Collection[Pair]:
        """Episodes that were started and are not over."""
        ...

    @property
    def occupied(self) -> int:
        """Episodes that hold a place."""
        ...

    def start(self, permit: msg.Permit, sample: int, record: Trajectory | None) -> None:
        """`record`: turns that a lost generator had done of it."""
        ...

    def swap(self, version: int) -> None:
        """Tokens from now on are of this version."""
        ...

    def abandon(self, groups: Collection[int]) -> None:
        """End the episodes of these groups; what there is of them is handed in."""
        ...

    def turns(self, pairs: Collection[Pair]) -> list[Trajectory]:
        """The finished turns of running episodes of training groups."""
        ...

    def clear(self) -> None:
        """Forget every episode."""
        ...

    def poll(self) -> None:
        """Something has happened: bring everything up to now."""
        ...


@dataclass(eq=False, kw_only=True)
class SimulatedGenerator(Process):
    """One life of a generator process."""

    newest: Callable[[], int]
    """version of the weights that can be read now"""
    first: Callable[[], int]
    """that of the weights that it gets first"""
    new_session: Callable[[], int]
    sequences: int
    """episodes at once"""
    group_size: int
    times: Times
    asks_ahead: bool
    """asks for groups without regard to the places that are taken"""
    reports: bool
    """shows canaries, reports its status and sends again what was not acknowledged"""
    decoder: SimulatedDecoder = field(init=False)
    link: Link = field(init=False)
    version: int = -1
    """-1: it has no weights yet"""
    announced: int = 0
    """newest version it has been told of"""
    loading: bool = False
    session: int = 0
    sessions: set[int] = field(default_factory=set)
    """of every Hello of this process"""
    granted: int = 0
    """permits of this session"""
    limit: int = -1
    """permits asked for in this session"""
    outbox: Outbox = field(default_factory=Outbox)
    recorded: dict[Pair, Trajectory] = field(default_factory=dict)
    """turns that lost generators had done, sent ahead of the permit"""
    leaving: bool = False
    lies: bool = False
    """what it reports is not what it did, in words that are sound"""
    begins: Callable[[msg.Permit], None] = lambda _: None
    """called with the permit of every episode that it starts"""
    expelled: Callable[[], None] = lambda: None
    """called when it is told that it was found to lie"""
    rejoined: int = 0
    reported_at: float = 0.0

    def begin(self) -> None:
        self.hello()
        self.after(self.times.start(), self.first_weights)

    def first_weights(self) -> None:
        self.version = self.first()
        self.decoder.swap(self.version)
        if self.reports:
            self.show()
        self.ask()
        if self.reports:
            self.report()

    # ------------------------------------------------------------------- sending

    def hello(self) -> None:
        self.session = self.new_session()
        self.sessions.add(self.session)
        self.link.send(msg.Hello(role="generator", name=self.name, pid=self.pid, session=self.session))

    def show(self) -> None:
        self.link.send(msg.Canary(name=self.name, version=self.version, digests=(), log_probs=(), session=self.session))

    def ask(self) -> None:
        """Ask for as many groups as there are places for."""
        taken = 0 if self.asks_ahead else self.decoder.occupied
        free = max(0, self.sequences - taken) // self.group_size
        limit = self.granted + free
        if limit > self.limit and not self.leaving and self.version >= 0:
            self.limit = limit
            self.link.send(msg.Want(limit=limit, version=self.version, session=self.session))

    def report(self) -> None:
        """Send the status and what is late; again after STATUS_S."""
        now = self.clock.now
        if self.reported_at and now - self.reported_at > RESEND_S:
            self.outbox.excuse(now - self.reported_at)
        self.reported_at = now
        status = msg.Status(
            name=self.name,
            session=self.session,
            version=self.version,
            limit=max(0, self.limit),
            groups=tuple({group for group, _ in self.in_hand()}),
            busy_seconds=now,
            wall_seconds=now,
            tokens_generated=0,
            running=len(self.decoder.running),
            waiting=0,
        )
        self.link.send(status)
        self.send(self.outbox.late(now))
        assert self.outbox.waited_s(now) < LONGEST_WAIT_S, f"{self.name} waits for an acknowledgement for ever"
        self.after(STATUS_S, self.report)

    def send(self, trajectories: Sequence[Trajectory]) -> None:
        if trajectories:
            self.link.send(msg.Finished(trajectories=tuple(trajectories), session=self.session))

    def send_turns(self, pairs: Collection[Pair]) -> None:
        if some := self.decoder.turns(pairs):
            self.link.send(msg.Turns(trajectories=tuple(some), session=self.session))

    def ended(self, trajectory: Trajectory) -> None:
        """An episode is over."""
        self.outbox.put(trajectory)
        if pause := self.times.hand_in():
            self.after(pause, self.hand_in)
        else:
            self.hand_in()

    def hand_in(self) -> None:
        self.send(self.outbox.take(self.clock.now))
        self.ask()

    def in_hand(self) -> set[Pair]:
        return {*self.decoder.running, *self.outbox.pairs}

    def leave(self) -> None:
        """End as a generator does that is told to: it hands over what is done."""
        self.leaving = True
        self.send_turns(list(self.decoder.running))
        self.send(self.outbox.take(self.clock.now))
        self.link.send(msg.Leave(name=self.name, reason="told to", session=self.session))
        self.die()

    # ----------------------------------------------------------------- receiving

    def receive(self, message: msg.Message) -> None:
        match message:
            case msg.Permits() if message.session == self.session:
                self.start(message)
                self.ask()
            case msg.Turns(trajectories=trajectories):
                self.recorded |= {(t.group, t.sample): t for t in trajectories}
            case msg.Unknown() if message.session == self.session:
                self.join_anew()
            case msg.Accepted(pairs=pairs):
                self.outbox.acknowledge(pairs)
            case msg.Abandon(groups=groups):
                self.decoder.abandon(groups)
            case msg.NewWeights(version=version):
                self.announced = max(self.announced, version)
                self.load()
            case msg.Refused(session=session) if session and session not in self.sessions:
                pass  # the process that had this name before is meant
            case msg.Refused(kind="quarantine"):
                self.expelled()
                return
            case msg.Refused(kind=kind, pairs=pairs):
                assert kind in HARMLESS, f"a sound {self.name} was refused: {message}"
                self.outbox.acknowledge(pairs)
            case msg.Stop():
                self.die()
        self.decoder.poll()

    def start(self, permits: msg.Permits) -> None:
        """Start what is not in hand. Without reports nothing is sent again, so that a new total means new permits."""
        known = self.in_hand() if self.reports or permits.granted <= self.granted else ()
        self.granted = max(self.granted, permits.granted)
        for permit in permits.permits:
            for sample in permit.samples:
                pair = permit.group, sample
                if pair not in known:
                    self.decoder.start(permit, sample, self.recorded.pop(pair, None))
                    self.begins(permit)

    def join_anew(self) -> None:
        """The buffer does not know this session."""
        self.rejoined += 1
        self.send_turns(list(self.decoder.running))
        self.decoder.clear()
        self.recorded.clear()
        self.granted, self.limit = 0, -1
        self.hello()
        self.ask()

    def load(self) -> None:
        if self.announced > self.version and not self.loading and self.version >= 0:
            self.loading = True
            self.after(self.times.load(), self.loaded)

    def loaded(self) -> None:
        self.loading = False
        self.version = max(self.version, self.newest())
        self.decoder.swap(self.version)
        if self.reports:
            self.show()
        self.link.send(msg.Holds(version=self.version, session=self.session))
        self.load()
