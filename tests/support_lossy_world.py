"""A world in which messages get lost, come twice and overtake each other, and generators freeze and die.

The generators keep to the protocol of generator/loop.py (its Outbox is the real one); nobody is told of a death.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from support_buffer_world import TRAINER, World, answer

from async_rl.buffer import effects as do
from async_rl.generator.outbox import Outbox
from async_rl.wire import messages as msg

ROOM = 3
"""groups a generator takes at once"""
STATUS_S = 0.5
AGAIN_S = 3.0
LONGEST_S = 3000.0
"""on the virtual clock; a run that takes longer hangs"""


@dataclass
class Life:
    """One generator process."""

    peer: bytes
    version: int
    session: int = 0
    granted: int = 0
    limit: int = 0
    running: dict[tuple[int, int], int] = field(default_factory=dict)
    """(group, sample) -> when it began, as a number of its own"""
    outbox: Outbox = field(default_factory=Outbox)
    dead: bool = False
    frozen_until: float = 0.0

    @property
    def in_hand(self) -> set[tuple[int, int]]:
        return {*self.running, *self.outbox.pairs}


@dataclass
class LossyWorld(World):
    """`loss`: chance that a message is lost; the chance that one comes twice is half of it."""

    deaths: int = 0
    """still to come"""
    freezes: int = 0
    lives_of: dict[bytes, Life] = field(default_factory=dict)
    sessions: int = 0
    episodes: int = 0
    wanted: int = 0
    """step of the batch the trainer waits for"""
    weights: int = 0
    evaluated: bool = False
    notes: list[do.Note] = field(default_factory=list)

    # ------------------------------------------------------------ network

    def send(self, sender: bytes, receiver: bytes, action: object) -> None:
        for _ in range(1 + (self.random.random() < self.loss / 2)):
            if self.random.random() >= self.loss:
                self.at(self.random.expovariate(20.0), action)

    def obey(self, effects: list[do.Effect]) -> None:
        super().obey(effects)
        for effect in effects:
            if isinstance(effect, do.Note):
                self.notes.append(effect)
            if isinstance(effect, do.Send) and effect.peer == TRAINER:
                self.send(b"", TRAINER, lambda m=effect.message: self.tell_trainer(m))

    def generator(self, peer: bytes, message: msg.Message, life: int) -> None:
        living = self.lives_of[peer]
        self.awake(living, lambda: self.hear(living, message))

    def awake(self, life: Life, action: object) -> None:
        """What happens to a frozen process happens when it wakes; to a dead one nothing does."""
        if life.dead:
            return
        if self.now < life.frozen_until:
            heapq.heappush(self.events, (life.frozen_until, next(self.count), lambda: self.awake(life, action)))
        else:
            action()  # type: ignore[operator]

    # --------------------------------------------------------- generators

    def join(self, peer: bytes) -> None:
        life = Life(peer=peer, version=self.weights)
        self.lives_of[peer] = life
        self.hello(life)
        self.status(life)

    def hello(self, life: Life) -> None:
        self.sessions += 1
        life.session, life.granted, life.limit = self.sessions, 0, 0
        life.running.clear()
        name = life.peer.decode()
        self.to_buffer(life.peer, msg.Hello(role="generator", name=name, pid=1, session=life.session))
        self.ask_for_permits(life)

    def ask_for_permits(self, life: Life) -> None:
        groups = {group for group, _ in life.running}
        life.limit = max(life.limit, life.granted + max(0, ROOM - len(groups)))
        self.to_buffer(life.peer, msg.Want(limit=life.limit, version=life.version, session=life.session))

    def status(self, life: Life) -> None:
        """Its standing, at a steady pace; also the moment at which it may freeze or die."""
        chance = self.random.random()
        if chance < 0.02 and self.deaths:
            self.deaths -= 1
            life.dead = True
            self.at(self.random.expovariate(0.5), lambda: self.join(life.peer))
            return
        if chance > 0.98 and self.freezes:
            self.freezes -= 1
            life.frozen_until = self.now + self.random.uniform(1, 40)
        standing = msg.Status(
            name=life.peer.decode(),
            session=life.session,
            version=life.version,
            limit=life.limit,
            groups=tuple({group for group, _ in life.in_hand}),
            busy_seconds=0.0,
            wall_seconds=0.0,
            tokens_generated=0,
            running=len(life.running),
            waiting=0,
        )
        self.to_buffer(life.peer, standing)
        if late := life.outbox.late(self.now):
            self.to_buffer(life.peer, msg.Finished(trajectories=late))
        self.at(STATUS_S, lambda: self.awake(life, lambda: self.status(life)))

    def hear(self, life: Life, message: msg.Message) -> None:
        match message:
            case msg.NewWeights(version=version):
                self.at(self.random.expovariate(5.0), lambda: self.awake(life, lambda: self.load(life, version)))
            case msg.Unknown(session=life.session):
                self.hello(life)
            case msg.Permits(session=life.session):
                life.granted = max(life.granted, message.granted)
                for permit in message.permits:
                    for sample in permit.samples:
                        if (permit.group, sample) not in life.in_hand:
                            self.begin(life, permit, sample)
                self.ask_for_permits(life)
            case msg.Accepted(pairs=pairs):
                life.outbox.acknowledge(pairs)
            case msg.Refused(kind=kind, pairs=pairs):
                assert kind in ("group", "stranger"), f"a sound generator is told: {message.reason}"
                life.outbox.acknowledge(pairs)
            case msg.Abandon(groups=groups):
                for group, sample in [key for key in life.running if key[0] in groups]:
                    del life.running[group, sample]

    def load(self, life: Life, version: int) -> None:
        if version > life.version:
            life.version = version
            self.to_buffer(life.peer, msg.Holds(version=version))

    def begin(self, life: Life, permit: msg.Permit, sample: int) -> None:
        self.episodes += 1
        number, version, key = self.episodes, life.version, (permit.group, sample)
        life.running[key] = number

        def finish() -> None:
            if life.running.get(key) != number:
                return  # given up, or begun anew
            del life.running[key]
            life.outbox.put(answer(permit, sample, version))
            self.to_buffer(life.peer, msg.Finished(trajectories=life.outbox.take(self.now)))
            self.ask_for_permits(life)

        seconds = self.random.expovariate(1.0) * self.spread ** self.random.random()
        self.at(seconds, lambda: self.awake(life, finish))

    # ------------------------------------------------------------ trainer

    def start(self) -> None:
        self.repeat()
        for i in range(self.generators):
            self.join(b"g%d" % i)
        self.tick()

    def tick(self) -> None:
        self.obey(self.core.tick(self.now))
        self.at(0.25, self.tick)

    def say(self) -> None:
        """All that the buffer must know, as trainer/inbox.py repeats it."""
        self.to_buffer(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1))
        if self.weights:
            self.to_buffer(TRAINER, msg.Published(version=self.weights))
        ask = msg.Evaluate(evaluation=0, version=0, problems=(0, 1), samples=2, temperature=1.0)
        if not self.evaluated:
            self.to_buffer(TRAINER, ask)
            self.to_buffer(TRAINER, msg.FetchEvaluation(evaluation=0, waits=True))
        self.to_buffer(TRAINER, msg.NextBatch(step=self.wanted))

    def repeat(self) -> None:
        self.say()
        self.at(AGAIN_S, self.repeat)

    def tell_trainer(self, message: msg.Message) -> None:
        if isinstance(message, msg.EvaluationResult) and message.finished:
            self.evaluated = True
        if isinstance(message, msg.Refused):
            assert message.what != "NextBatch" or message.kind == "stranger", message.reason

    def train(self, step: int) -> None:
        if step == self.wanted and self.weights == step:
            self.wanted = step + 1
            self.at(self.random.expovariate(2.0), lambda: self.publish(step + 1))

    def publish(self, version: int) -> None:
        self.weights = version
        self.finished = version >= self.steps and self.evaluated
        self.say()

    def run(self) -> None:
        self.start()
        while not self.finished:
            self.now, _, action = heapq.heappop(self.events)
            action()  # type: ignore[operator]
            self.finished |= self.weights >= self.steps and self.evaluated
            assert self.now < LONGEST_S, f"it hangs: {self.core.wait_reason(self.now)}"
            if self.wanted >= self.steps:
                self.wanted = self.steps - 1  # the last batch may be asked for again, none behind it
