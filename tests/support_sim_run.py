"""A whole run on a virtual clock: the real state machine, a store that forgets what was not committed, models of
everything around it, a launcher that starts again what died, and the invariants watched from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from support_buffer_world import make_core
from support_sim_clock import Clock, Link, Process
from support_sim_generator import Generator
from support_sim_store import FakeStore
from support_sim_trainer import Trainer

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.loop import carry_out
from async_rl.buffer.restore import read_standing, restore
from async_rl.buffer.staleness import Policy
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack
from async_rl.wire import messages as msg

TICK_S = 1.0
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
            case "join generator":
                self.spawn(f"generator-{random.randint(5, 7)}")

    def bury(self, name: str, life: Generator) -> None:
        life.die()
        if self.clock.chance(0.5):
            self.links[name].incarnation += 1  # what it had sent is lost with it
        self.start_again(name, life.pid)

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


@dataclass(eq=False)
class Watch:
    """Knows what must never happen. It looks at writes, answers and steps, never at the state machine's own books."""

    run: Run
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """training group -> (position, attempt)"""
    refused: dict[int, str] = field(default_factory=dict)
    formed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answered: dict[int, list[Any]] = field(default_factory=dict)
    """batch of each step as it was first sent"""
    stored: set[tuple[int, int]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def committed(self, writes: Sequence[do.Effect]) -> None:
        for effect in writes:
            match effect:
                case do.AddGroup(split="train"):
                    self.ask(effect)
                case do.AddTrajectories(trajectories=many) | do.AddDropped(trajectories=many):
                    for t in many:
                        assert (t.group, t.sample) not in self.stored, "a trajectory is stored once"
                        self.stored.add((t.group, t.sample))
                case do.RefuseGroup(group=group, reason=reason):
                    assert group not in self.refused
                    self.refused[group] = reason
                    stale = reason.startswith("stale")
                    assert self.run.plan.policy.refills or not stale, "nothing admitted gets too old"
                case do.FormBatch(step=step, groups=groups):
                    assert step == len(self.formed)
                    assert len(set(groups)) == self.run.plan.policy.groups_per_step
                    assert not set(groups) & set(self.refused)
                    assert not set(groups) & {g for some in self.formed.values() for g in some}
                    self.formed[step] = groups

    def noted(self, event: str, **detail: object) -> None:
        """A row for events.jsonl."""
        self.counts[event] += 1

    def ask(self, admitted: do.AddGroup) -> None:
        """The prompt order without gap or repeat, or what was dropped, as a further attempt."""
        position, attempt = admitted.position, admitted.attempt
        assert admitted.group not in self.asked
        assert admitted.problem == position
        assert (position, attempt) not in self.asked.values()
        if attempt == 0:
            assert position == 1 + max((p for p, _ in self.asked.values()), default=-1)
        else:
            before = [group for group, place in self.asked.items() if place == (position, attempt - 1)]
            assert [self.refused[group].split(":")[0] for group in before] == ["stale"]
        self.asked[admitted.group] = position, attempt

    def told(self, message: msg.Message) -> None:
        """Nothing is acknowledged that is not in the store, unless its group is given up or of an evaluation."""
        match message:
            case msg.Accepted(pairs=pairs):
                for group, sample in pairs:
                    known = (group, sample) in self.stored
                    assert known or group in self.refused or group not in self.asked, (group, sample)
            case msg.Permits(permits=permits):
                self.counts["permits"] += len(permits)

    def slots(self, core: Core) -> None:
        ended = len(self.refused) + sum(map(len, self.formed.values()))
        assert len(self.asked) - ended <= self.run.plan.policy.slots, "permits stay within the slots"
        held = [group for g in core.admission.generators.values() for group in g.groups]
        assert len(held) == len(set(held)), "a group is in one generator's hands"

    def sent(self, step: int, batch: Sequence[Trajectory]) -> None:
        seen = [(t.group, t.sample, t.versions, t.ended) for t in batch]
        assert self.answered.setdefault(step, seen) == seen, "a batch is answered identically whenever asked"

    def trained(self, step: int, batch: Sequence[Trajectory]) -> None:
        policy = self.run.plan.policy
        assert list(dict.fromkeys(t.group for t in batch)) == list(self.formed[step])
        for t in batch:
            lag = step - t.version_min if t.version_min >= 0 and not t.failed else 0
            assert lag <= policy.max_staleness, f"group {t.group} trained {lag} steps after its weights"
            assert t.version_max <= step, "sampled by weights that did not exist when the batch was formed"
        self.counts["steps"] += 1

    def restored(self, core: Core) -> None:
        """What the store has is what the state machine goes on with."""
        ended = {g for some in self.formed.values() for g in some} | set(self.refused)
        assert set(core.groups) == set(self.asked) - ended
        assert core.step == len(self.formed)

    def audit(self) -> None:
        plan, learned = self.run.plan, self.run.learned
        assert len(learned) == len(set(learned)), "no group is in the weights twice"
        assert learned == [group for step in range(plan.steps) for group in self.formed[step]]
        live = set(self.run.buffer.core.groups)
        batched = {g for some in self.formed.values() for g in some}
        assert set(self.asked) == batched | set(self.refused) | live
        assert not batched & set(self.refused)
        assert not live & (batched | set(self.refused))
        refusals = self.run.buffer.core.refusals.counts
        assert refusals.keys() <= {"group", "stranger", "number"}, refusals
