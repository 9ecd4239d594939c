"""A whole run on a virtual clock: the real state machine, a store that forgets what was not committed, models of
everything around it, a launcher that starts again what died, and the invariants watched from outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from support_buffer_world import make_core
from support_sim_buffer import Buffer
from support_sim_clock import Clock, Link, Process
from support_sim_generator import Generator
from support_sim_store import FakeStore
from support_sim_trainer import Trainer
from support_sim_watch import Watch

from async_rl.buffer.restore import read_standing, restore
from async_rl.buffer.staleness import Policy
from async_rl.wire import messages as msg

PATIENCE_S = 1200.0
"""of virtual time: so long after the last fault a run must have finished"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One schedule, all of it drawn from `seed`."""

    seed: int
    policy: Policy
    group_size: int = 2
    generators: int = 2
    room: int = 2
    steps: int = 6
    every: int = 2
    """steps between checkpoints"""
    evaluate_every: int = 0
    drop_zero_signal: bool = False
    failure: float = 0.0
    spread: float = 1.0
    delay: float = 0.02
    turn_s: float = 0.4
    step_s: float = 0.5
    faults: tuple[tuple[float, str], ...] = ()
    """(when, what), seconds"""


@dataclass(eq=False)
class Run:
    """The launcher's view: what lives, what is on the disk, what goes wrong when."""

    plan: Plan
    store: Any = field(default_factory=FakeStore)
    clock: Clock = field(init=False)
    watch: Watch = field(init=False)
    buffer: Buffer = field(init=False)
    trainer: Trainer = field(init=False)
    generators: dict[str, Generator] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    shared: int = 0
    """version of the weights that generators can read"""
    saved: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=lambda: [(0, 0, ())])
    """checkpoints: version, evaluations asked, the groups in its weights in the order of training"""
    learned: list[int] = field(default_factory=list)
    """groups in the trainer's weights"""
    pids: int = 100
    launches: int = 0
    done: bool = False
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = Clock(Random(self.plan.seed), delay=self.plan.delay)
        self.watch = Watch(self)
        for when, what in self.plan.faults:
            self.clock.at(when, lambda what=what: self.fault(what))
        self.launch()

    def play(self) -> None:
        """To the end of the run. Raises AssertionError when an invariant breaks or it does not end."""
        end = max((when for when, _ in self.plan.faults), default=0.0)
        while not self.done:
            self.clock.step()
            late = self.clock.now > end + PATIENCE_S or self.clock.happened > 150_000
            assert not late, f"no end in sight: {self.buffer.core.wait_reason(self.clock.now)}"
        self.watch.audit()

    # ---------------------------------------------------------------- launcher

    def launch(self) -> None:
        """Start everything, where the newest checkpoint (or the one before, if that is damaged) has it."""
        self.launches += 1
        if len(self.saved) > 1 and self.clock.chance(0.2):
            self.saved.pop()
        version, evaluations, learned = self.saved[-1]
        self.learned = list(learned)
        self.shared = version
        plan = self.plan
        core = make_core(
            plan.policy,
            group_size=plan.group_size,
            drop_zero_signal=plan.drop_zero_signal,
            vocabulary=100,
            max_permits=plan.room,
        )
        core.trainer = b""
        if self.launches > 1:
            self.store.rewind(version=version, now=self.clock.now)
            self.store.commit()
            restore(core, read_standing(self.store), version=version)
            self.watch.restored(core)
        self.buffer = Buffer(clock=self.clock, name="buffer", run=self, core=core, store=self.store)
        self.buffer.begin()
        self.trainer = Trainer(
            clock=self.clock,
            name="trainer",
            pid=self.pid(),
            run=self,
            version=version,
            steps=plan.steps,
            every=plan.every,
            evaluate_every=plan.evaluate_every,
            evaluations=evaluations,
            step_s=plan.step_s,
        )
        self.connect(self.trainer)
        self.trainer.begin()
        self.connect(Process(clock=self.clock, name="launcher"))
        for number in range(plan.generators):
            self.spawn(f"generator-{number}")

    def spawn(self, name: str) -> None:
        if self.done or name in self.generators:
            return
        plan = self.plan
        made = Generator(
            clock=self.clock,
            name=name,
            pid=self.pid(),
            newest=lambda: self.shared,
            room=plan.room,
            group_size=plan.group_size,
            turn_s=plan.turn_s,
            spread=plan.spread,
            failure=plan.failure,
        )
        self.generators[name] = made
        self.connect(made)
        made.begin()

    def connect(self, process: Any) -> None:
        buffer = self.buffer
        link = Link(clock=self.clock, identity=process.name.encode(), owner=process, to_buffer=buffer.receive)
        self.links[process.name] = link
        process.link = link

    def pid(self) -> int:
        self.pids += 1
        return self.pids

    def fall(self) -> None:
        """Everything dies; somebody resumes the run."""
        for process in (self.buffer, self.trainer, *self.generators.values()):
            process.die()
        for link in self.links.values():
            link.incarnation += 1
        self.generators.clear()
        self.store.crash()
        launches = self.launches
        self.clock.at(self.clock.about(1.0), lambda: self.launch() if self.launches == launches else None)

    # ------------------------------------------------------------------ trainer

    def share_weights(self, version: int) -> None:
        self.shared = version

    def train(self, step: int, batch: msg.Batch) -> None:
        self.watch.trained(step, batch.trajectories)
        self.learned += dict.fromkeys(t.group for t in batch.trajectories)

    def save(self, version: int, evaluations: int) -> None:
        self.saved.append((version, evaluations, tuple(self.learned)))

    def finish(self) -> None:
        self.done = True

    # ------------------------------------------------------------------- faults

    def fault(self, what: str) -> None:
        if self.done or not self.buffer.alive:
            return
        self.story.append(f"{self.clock.now:.3f} {what}")
        random, name = self.clock.random, None
        if self.generators:
            name = random.choice(sorted(self.generators))
        match what:
            case "kill buffer":
                self.buffer.doomed = True
            case "kill trainer" | "kill launcher":
                self.fall()
            case "freeze buffer":
                self.buffer.freeze(self.clock.about(8.0))
            case "freeze trainer":
                self.trainer.freeze(self.clock.about(8.0))
            case "cut trainer":
                self.links["trainer"].cut(self.clock.about(1.0))
            case "slow":
                self.clock.delay, before = 0.5, self.plan.delay
                self.clock.at(self.clock.about(5.0), lambda: setattr(self.clock, "delay", before))
            case "kill generator" if name:
                self.bury(name, self.generators[name])
            case "freeze generator" if name:
                self.generators[name].freeze(self.clock.about(12.0))
            case "leave generator" if name:
                self.generators[name].leave()
                self.start_again(name, self.generators[name].pid)
            case "cut generator" if name:
                self.links[name].cut(self.clock.about(1.0))
            case "vanish generator" if name:
                self.vanish(name)
            case "join generator":
                self.spawn(f"generator-{random.randint(5, 7)}")

    def bury(self, name: str, life: Generator) -> None:
        life.die()
        if self.clock.chance(0.5):
            self.links[name].incarnation += 1  # what it had sent is lost with it
        self.start_again(name, life.pid)

    def vanish(self, name: str) -> None:
        """With its host: nobody sees it end. Another one comes some time later."""
        self.generators.pop(name).die()
        self.links[name].incarnation += 1
        self.pids += 1
        launches, other = self.launches, f"generator-of-host-{self.pids}"
        self.clock.at(self.clock.about(3.0), lambda: self.spawn(other) if self.launches == launches else None)

    def start_again(self, name: str, pid: int) -> None:
        """The launcher sees the end of that life, tells the buffer, starts another after a pause."""
        del self.generators[name]
        launches = self.launches

        def noticed() -> None:
            if self.launches == launches and self.buffer.alive:
                self.links["launcher"].send(msg.Gone(name=name, pid=pid, reason="died"))
                self.clock.at(self.clock.about(1.0), again)

        def again() -> None:
            if self.launches == launches and self.buffer.alive:
                self.spawn(name)

        self.clock.at(self.clock.about(0.3), noticed)
