"""A generator without an engine: the conversation of generator/loop.py, episodes that take a random time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from support_buffer_world import answer
from support_sim_clock import Link, Process

from async_rl.generator.outbox import RESEND_S, Outbox
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.wire import messages as msg
from async_rl.wire.frames import HARMLESS

STATUS_S = 1.0
Pair = tuple[int, int]


@dataclass
class Episode:
    """One that runs, token by token: a prompt token, then one token a turn."""

    permit: msg.Permit
    sample: int
    turns: int
    """it will have"""
    versions: list[int] = field(default_factory=list)
    """of the turns it has"""

    def trajectory(self, **how: object) -> Trajectory:
        many = len(self.versions)
        return answer(
            self.permit,
            self.sample,
            0,
            tokens=np.arange(many + 1, dtype=np.int32),
            log_behaviour=np.array([0.0, *(-1.0 for _ in range(many))], np.float32),
            turns=tuple(Turn(start=1 + i, length=1) for i in range(many)),
            versions=tuple(VersionSpan(version=v, start=1 + i, end=2 + i) for i, v in enumerate(self.versions)),
            **how,
        )


@dataclass(eq=False, kw_only=True)
class Generator(Process):
    """One life of a generator process."""

    newest: Callable[[], int]
    """the weights that can be read now"""
    room: int
    """groups at once"""
    group_size: int
    turn_s: float
    spread: float
    """ratio of slow to fast episodes"""
    failure: float
    """chance that an episode fails"""
    link: Link = field(init=False)
    version: int = -1
    announced: int = 0
    loading: bool = False
    session: int = 0
    received: int = 0
    told_limit: int = -1
    running: dict[Pair, Episode] = field(default_factory=dict)
    outbox: Outbox = field(default_factory=Outbox)
    recorded: dict[Pair, Trajectory] = field(default_factory=dict)
    leaving: bool = False
    rejoined: int = 0
    slept: float = 0.0

    def begin(self) -> None:
        self.hello()
        self.after(self.clock.about(0.5), self.first_weights)

    def first_weights(self) -> None:
        self.version = self.newest()
        self.show()
        self.ask()
        self.report()

    # ----------------------------------------------------------------- talking

    def say(self, message: msg.Message) -> None:
        self.link.send(message)

    def hello(self) -> None:
        self.session = self.clock.random.getrandbits(60) + 1
        self.say(msg.Hello(role="generator", name=self.name, pid=self.pid, session=self.session))

    def show(self) -> None:
        self.say(msg.Canary(name=self.name, version=self.version, digests=(), log_probs=()))

    def ask(self) -> None:
        free = max(0, self.room * self.group_size - len(self.running)) // self.group_size
        limit = self.received + free
        if limit > self.told_limit and not self.leaving and self.version >= 0:
            self.told_limit = limit
            self.say(msg.Want(limit=limit, version=self.version, session=self.session))

    def report(self) -> None:
        now = self.clock.now
        if self.slept and now - self.slept > RESEND_S:
            self.outbox.excuse(now - self.slept)
        self.slept = now
        standing = msg.Status(
            name=self.name,
            session=self.session,
            version=self.version,
            limit=max(0, self.told_limit),
            groups=tuple({group for group, _ in self.in_hand()}),
            busy_seconds=now,
            wall_seconds=now,
            tokens_generated=0,
            running=len(self.running),
            waiting=0,
        )
        self.say(standing)
        self.finished(self.outbox.late(now))
        assert self.outbox.waited_s(now) < 120, f"{self.name} waits for an acknowledgement for ever"
        self.after(STATUS_S, self.report)

    def finished(self, trajectories: Sequence[Trajectory]) -> None:
        if trajectories:
            self.say(msg.Finished(trajectories=tuple(trajectories)))

    def turns(self, pairs: Sequence[Pair]) -> None:
        done = [self.running[p] for p in pairs if p in self.running and self.running[p].permit.split == "train"]
        some = [e.trajectory(ended="aborted", info={"turns_stopped": "1"}) for e in done if e.versions]
        if some:
            self.say(msg.Turns(trajectories=tuple(some)))

    def in_hand(self) -> set[Pair]:
        return {*self.running, *self.outbox.pairs}

    # ----------------------------------------------------------------- hearing

    def hear(self, message: msg.Message) -> None:
        match message:
            case msg.Permits() if message.session == self.session:
                self.received = max(self.received, message.granted)
                for permit in message.permits:
                    self.start(permit)
                self.ask()
            case msg.Turns(trajectories=trajectories):
                self.recorded |= {(t.group, t.sample): t for t in trajectories}
            case msg.Unknown() if message.session == self.session:
                self.join_anew()
            case msg.Accepted(pairs=pairs):
                self.outbox.acknowledge(pairs)
            case msg.Abandon(groups=groups):
                for pair in [pair for pair in self.running if pair[0] in groups]:
                    self.end(pair, ended="aborted", reason=msg.ABANDONED)
            case msg.NewWeights(version=version):
                self.announced = max(self.announced, version)
                self.load()
            case msg.Refused(kind=kind, pairs=pairs):
                assert kind in HARMLESS, f"a sound {self.name} was refused: {message}"
                self.outbox.acknowledge(pairs)
            case msg.Stop():
                self.die()

    def join_anew(self) -> None:
        self.rejoined += 1
        self.turns(list(self.running))
        for held in (self.running, self.recorded):
            held.clear()
        self.received, self.told_limit = 0, -1
        self.hello()
        self.ask()

    def load(self) -> None:
        if self.announced > self.version and not self.loading and self.version >= 0:
            self.loading = True
            self.after(self.clock.about(0.1), self.loaded)

    def loaded(self) -> None:
        self.loading = False
        self.version = max(self.version, self.newest())
        self.show()
        self.say(msg.Holds(version=self.version))
        self.load()

    def leave(self) -> None:
        """Told to end: what is done is handed over."""
        self.leaving = True
        self.turns(list(self.running))
        self.finished(self.outbox.take(self.clock.now))
        self.say(msg.Leave(name=self.name, reason="told to", session=self.session))
        self.die()

    # ---------------------------------------------------------------- episodes

    def start(self, permit: msg.Permit) -> None:
        in_hand = self.in_hand()
        for sample in permit.samples:
            pair = permit.group, sample
            if pair in in_hand:
                continue
            slow = self.spread ** self.clock.random.random()
            episode = Episode(permit, sample, turns=self.clock.random.randint(1, 3))
            record = self.recorded.pop(pair, None)
            if record is not None:
                episode.versions = [span.version for span in record.versions]
                episode.turns = max(episode.turns, len(episode.versions))
            self.running[pair] = episode
            self.go_on(episode, self.turn_s * slow)

    def go_on(self, episode: Episode, pause: float) -> None:
        self.after(self.clock.about(pause), lambda: self.turn(episode, pause))

    def turn(self, episode: Episode, pause: float) -> None:
        pair = episode.permit.group, episode.sample
        if self.running.get(pair) is not episode:
            return
        if len(episode.versions) < episode.turns:
            episode.versions.append(self.version)
        if len(episode.versions) < episode.turns:
            if self.clock.chance(0.5):
                self.turns([pair])
            self.go_on(episode, pause)
        elif self.clock.chance(self.failure):
            self.end(pair, ended="error", reason="RewardError: no")
        else:
            self.end(pair, ended="finished")

    def end(self, pair: Pair, **how: object) -> None:
        episode = self.running.pop(pair)
        self.outbox.put(episode.trajectory(**how))
        self.after(0.004, self.flush)

    def flush(self) -> None:
        self.finished(self.outbox.take(self.clock.now))
        self.ask()
