"""A whole run on a virtual clock: what lives, what is on the disk, what goes wrong when, and who restarts it.

Who waits for whom: as in a run. The launcher restarts what died, each generator by itself and everything else
together, from the newest checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from async_rl.buffer.core import Core
from async_rl.buffer.verification import LIVES, of_the_launcher
from async_rl.instruments.world.buffer import SimulatedBuffer, WorldWatch
from async_rl.instruments.world.clock import Clock, Link, Network, Process
from async_rl.instruments.world.generator import SimulatedDecoder, SimulatedGenerator
from async_rl.instruments.world.times import RandomTimes, Times
from async_rl.instruments.world.trainer import SimulatedTrainer
from async_rl.wire import messages as msg

LONGEST_S = 1200.0
"""of virtual time: so long after the last fault a run must have finished"""
MOST_ACTIONS = 150_000
DAMAGED = 0.2
"""chance that the newest checkpoint cannot be read"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldPlan:
    """One run. Everything random in it is drawn from `seed`."""

    seed: int
    steps: int
    generators: int
    sequences: int
    """episodes that a generator runs at once"""
    decoder: Callable[[SimulatedGenerator], SimulatedDecoder]
    network: Network = field(default_factory=Network)
    reports: bool = True
    """processes report their status, repeat what was not answered and show canaries, and the buffer has a clock.
    Without it the network must lose nothing, and whatever is due must follow from a message"""
    asks_ahead: bool = False
    """generators ask for groups without regard to the places that are taken: when they get them is up to the buffer
    alone, and no later question makes up for one that it forgets"""
    streams: bool = False
    """weights come as streams: the first that a generator gets may be one version behind the newest"""
    behind_s: float = 0.0
    """seconds by which what the buffer decides is stored and answered later, by a thread of its own; 0: at once"""
    save_every: int = 0
    """steps between checkpoints; 0: none but the last"""
    evaluate_every: int = 0
    """0: never"""
    faults: tuple[tuple[float, str], ...] = ()
    """(when, what), seconds; see World.fault"""


@dataclass(eq=False)
class World:
    """The launcher's view of a run."""

    plan: WorldPlan
    new_core: Callable[[], Core]
    watch: WorldWatch = field(default_factory=WorldWatch)
    store: Any = None
    """with the writes and reads of buffer/store.py, and `crash`: what was not committed is gone, the process that
    wrote it is dead. None: nothing is written, and only generators can be restarted"""
    new_times: Callable[[Clock], Times] = RandomTimes
    clock: Clock = field(init=False)
    network: Network = field(init=False)
    times: Times = field(init=False)
    buffer: SimulatedBuffer = field(init=False)
    trainer: SimulatedTrainer = field(init=False)
    generators: dict[str, SimulatedGenerator] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    shared: int = 0
    """version of the weights that generators can read"""
    saved: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=lambda: [(0, 0, ())])
    """checkpoints: version, evaluations asked, the groups in its weights in the order of training"""
    learned: list[int] = field(default_factory=list)
    """groups in the trainer's weights"""
    pids: itertools.count[int] = field(default_factory=lambda: itertools.count(101))
    sessions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    launches: int = 0
    poisonous: set[tuple[str, int]] = field(default_factory=set)
    """(split, problem) whose code ends the generator that runs it"""
    lying: set[tuple[str, int]] = field(default_factory=set)
    """(name, session) of generators that lie"""
    done: bool = False
    failure: str = ""
    """why the buffer has ended the run"""
    before: Core | None = None
    """the state machine of the buffer that died last, if all it had decided was committed"""
    story: list[str] = field(default_factory=list)
    """the faults so far"""

    def __post_init__(self) -> None:
        self.clock = Clock(Random(self.plan.seed))
        self.network = replace(self.plan.network)
        self.times = self.new_times(self.clock)
        for when, what in self.plan.faults:
            self.clock.at(when, lambda what=what: self.fault(what))  # type: ignore[misc]
        self.launch()

    def play(self) -> None:
        """To the end of the run. Raises AssertionError when it does not end."""
        end = max((when for when, _ in self.plan.faults), default=0.0)
        while not self.done:
            assert self.clock.events, f"deadlock: {self.buffer.core.wait_reason(self.clock.now)}"
            self.clock.step()
            late = self.clock.now > end + LONGEST_S or self.clock.happened > MOST_ACTIONS
            assert not late, f"no end in sight: {self.buffer.core.wait_reason(self.clock.now)}"

    # ---------------------------------------------------------------- launcher

    def launch(self) -> None:
        """Start everything where the newest checkpoint (or the one before, if that is damaged) has it."""
        self.launches += 1
        if len(self.saved) > 1 and self.clock.chance(DAMAGED):
            self.saved.pop()
        version, evaluations, learned = self.saved[-1]
        self.learned = list(learned)
        self.shared = version
        core = self.new_core()
        if self.launches > 1:
            self.restore(core, version)
        self.buffer = SimulatedBuffer(
            clock=self.clock,
            name="buffer",
            core=core,
            store=self.store,
            watch=self.watch,
            ticks=self.plan.reports,
            behind_s=self.plan.behind_s,
            killed=self.fall,
            failed=self.fail,
        )
        self.buffer.begin()
        self.trainer = SimulatedTrainer(
            clock=self.clock,
            name="trainer",
            pid=next(self.pids),
            surroundings=self,
            times=self.times,
            version=version,
            steps=self.plan.steps,
            save_every=self.plan.save_every,
            evaluate_every=self.plan.evaluate_every,
            evaluations=evaluations,
            repeats=self.plan.reports,
        )
        self.trainer.link = self.connect(self.trainer)
        self.trainer.begin()
        self.connect(Process(clock=self.clock, name="launcher"))
        for number in range(self.plan.generators):
            self.spawn(f"generator-{number}")

    def restore(self, core: Core, version: int) -> None:
        """What a buffer does that finds a store, for a trainer that begins at `version`."""
        from async_rl.buffer import restore  # SQLite, for those who have a store only

        self.store.rewind(version=version, now=self.clock.now)
        self.reopened()
        self.store.commit()
        restore.restore(core, restore.read_state(self.store), version=version)
        self.watch.restored(core, self.before)

    def reopened(self) -> None:
        """The store that a buffer has left was opened by the next one."""

    def spawn(self, name: str) -> None:
        """Start a generator, unless it lives."""
        if self.done or name in self.generators:
            return
        made = SimulatedGenerator(
            clock=self.clock,
            name=name,
            pid=next(self.pids),
            newest=lambda: self.shared,
            first=self.first_version,
            new_session=lambda: self.new_session(name),
            begins=lambda permit: self.begun(name, permit),
            expelled=lambda: self.expel(name),
            sequences=self.plan.sequences,
            group_size=self.buffer.core.rules.group_size,
            times=self.times,
            asks_ahead=self.plan.asks_ahead,
            reports=self.plan.reports,
        )
        made.decoder = self.plan.decoder(made)
        self.generators[name] = made
        made.link = self.connect(made)
        made.begin()

    def first_version(self) -> int:
        """Of the weights that a generator gets first."""
        late = self.plan.streams and self.clock.random.random() < 0.5
        return max(0, self.shared - late)

    def new_session(self, name: str) -> int:
        """Of that generator, which goes on to lie if it did."""
        session = next(self.sessions)
        if (life := self.generators.get(name)) is not None and life.lies:
            self.lying.add((name, session))
        return session

    def connect(self, process: Process) -> Link:
        link = self.links[process.name] = Link(
            clock=self.clock,
            network=self.network,
            identity=process.name.encode(),
            owner=process,
            deliver=self.buffer.deliver,
        )
        return link

    def fall(self, before: Core | None) -> None:
        """Everything dies, and somebody resumes the run."""
        self.before = before
        for process in (self.buffer, self.trainer, *self.generators.values()):
            process.die()
        for link in self.links.values():
            link.lose()
        self.generators.clear()
        self.store.crash()
        self.later(self.clock.about(1.0), self.launch)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` in the present launch only."""
        launches = self.launches
        self.clock.at(seconds, lambda: action() if self.launches == launches else None)

    def fail(self, reason: str) -> None:
        self.failure = reason

    # ------------------------------------------------------- around the trainer

    def share_weights(self, version: int) -> None:
        self.shared = version

    def train(self, step: int, batch: msg.Batch) -> None:
        self.watch.trained(step, batch)
        self.learned += dict.fromkeys(t.group for t in batch.trajectories)

    def verify(self, message: msg.Verify) -> msg.Verdict | None:
        """What the trainer finds out about trajectories; None: they are what they say."""
        if (message.name, message.session) not in self.lying:
            return None
        return msg.Verdict(name=message.name, session=message.session, lie="tokens", reason="no", proven=True)

    def save(self, version: int, evaluations: int) -> None:
        self.saved.append((version, evaluations, tuple(self.learned)))

    def finish(self) -> None:
        self.done = True

    # ------------------------------------------------------------------- faults

    def fault(self, what: str) -> None:
        """Something goes wrong: with the run, the network, or one of the generators."""
        if self.done or not self.buffer.alive:
            return
        self.story.append(f"{self.clock.now:.3f} {what}")
        match what:
            case "kill buffer":
                self.buffer.doomed = True
            case "kill trainer" | "kill launcher":
                self.fall(self.buffer.settled)
            case "freeze buffer":
                self.buffer.freeze(self.clock.about(8.0))
            case "freeze trainer":
                self.trainer.freeze(self.clock.about(8.0))
            case "cut trainer":
                self.links["trainer"].cut(self.clock.about(1.0))
            case "slow":
                self.network.delay_s = 0.5
                self.clock.at(self.clock.about(5.0), self.be_fast_again)
            case "join generator":
                self.spawn(f"generator-{self.clock.random.randint(5, 7)}")
            case _ if self.generators:
                self.generator_fault(what, self.clock.random.choice(sorted(self.generators)))

    def generator_fault(self, what: str, name: str) -> None:
        life = self.generators[name]
        match what:
            case "kill generator":
                life.die()
                if self.clock.chance(0.5):
                    self.links[name].lose()  # what it had sent is lost with it
                self.restart(name)
            case "freeze generator":
                life.freeze(self.clock.about(12.0))
            case "leave generator":
                life.leave()
                self.restart(name)
            case "cut generator":
                self.links[name].cut(self.clock.about(1.0))
            case "lie generator":
                life.lies = True
                self.lying.add((name, life.session))
            case "poison generator":
                core = self.buffer.core
                numbers = sorted({number for number, _ in life.decoder.running})
                known = [core.groups.get(number) or core.evaluations.group(number) for number in numbers]
                if running := [group for group in known if group is not None]:
                    group = self.clock.random.choice(running)
                    self.poisonous.add((group.split, group.problem))
                    self.poison(name, life, group.group)
            case "vanish generator":
                self.vanish(name)
            case _:
                raise ValueError(f"no such fault: {what}")

    def begun(self, name: str, permit: msg.Permit) -> None:
        """A generator starts an episode; a problem that is poison ends it at once."""
        if (permit.split, permit.problem) in self.poisonous:
            life = self.generators[name]
            self.later(0.0, lambda: self.poison(name, life, permit.group))

    def poison(self, name: str, life: SimulatedGenerator, group: int) -> None:
        """The code of this group ends the generator, if it still runs it."""
        if self.generators.get(name) is life and life.alive and group in {number for number, _ in life.decoder.running}:
            life.die()
            if self.clock.chance(0.5):
                self.links[name].lose()
            self.restart(name, group=group)

    def expel(self, name: str) -> None:
        """A generator was told that it lied, or that too many of its name did: it ends, and an honest one comes."""
        life = self.generators.pop(name)
        liars = sum(name == liar for liar, _ in self.lying)
        enough = LIVES if of_the_launcher(name) else 1
        assert life.lies or liars >= enough, f"a sound {name} was taken for a liar"
        life.die()
        other = f"generator-of-host-{next(self.pids)}"
        self.later(self.clock.about(1.0), lambda: self.spawn(other))

    def be_fast_again(self) -> None:
        self.network.delay_s = self.plan.network.delay_s

    def vanish(self, name: str) -> None:
        """A generator is gone with its host, and nobody sees it end. Another one comes some time later."""
        self.generators.pop(name).die()
        self.links[name].lose()
        other = f"generator-of-host-{next(self.pids)}"
        self.later(self.clock.about(3.0), lambda: self.spawn(other))

    def restart(self, name: str, *, group: int = -1) -> None:
        """The launcher sees a generator's end, tells the buffer, and starts another after a pause. `group`: whose code
        ran then, if that is why."""
        pid = self.generators.pop(name).pid

        def noticed() -> None:
            if self.buffer.alive:
                groups = (group,) if group >= 0 else ()
                self.links["launcher"].send(msg.Gone(name=name, pid=pid, reason="died", groups=groups))
                self.later(self.clock.about(1.0), again)

        def again() -> None:
            if self.buffer.alive:
                self.spawn(name)

        # the end is sometimes seen before the last words of that life arrive
        self.later(self.clock.about(self.clock.random.choice((0.005, 0.3))), noticed)
