"""The buffer's state machine among generators and a trainer on a virtual clock."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import numpy as np
from hypothesis import strategies as st

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.depth import Rules
from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy, WaitPolicy
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import group_seed, sample_seed
from async_rl.wire import messages as msg

TRAINER = b"trainer"


def trajectory(group: int, sample: int, version: int, *, split: str = "train", **changes: object) -> Trajectory:
    """What a generator answers to the permit of this training group, while no evaluation took a number."""
    values: dict[str, object] = {
        "group": group,
        "sample": sample,
        "problem": group,
        "split": split,
        "seed": sample_seed(group_seed(0, group), sample),
        "tokens": np.array([1, 2], np.int32),
        "log_behaviour": np.array([0.0, -1.0], np.float32),
        "turns": (Turn(start=1, length=1),),
        "versions": (VersionSpan(version=version, start=1, end=2),),
        "reward": float(Random(31 * group + sample).random() < 0.5),
        "ended": "finished",
    }
    return Trajectory(**{**values, **changes})  # type: ignore[arg-type]


def answer(permit: msg.Permit, sample: int, version: int, **changes: object) -> Trajectory:
    """One trajectory for a permit."""
    asked = {
        "problem": permit.problem,
        "seed": sample_seed(permit.seed, sample),
        "temperature": permit.temperature,
    }
    return trajectory(permit.group, sample, version, split=permit.split, **{**asked, **changes})


def make_core(policy: Policy, **changes: object) -> Core:
    """It has heard the trainer's Hello."""
    values: dict[str, object] = {
        "policy": policy,
        "group_size": 2,
        "temperature": 1.0,
        "drop_zero_signal": False,
        "max_failures": 10**9,
        "max_refusals": 10**9,
        "seed": 0,
    }
    core = Core(Rules(**{**values, **changes}), problem_at=lambda position: position)  # type: ignore[arg-type]
    core.handle(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1), 0.0)
    return core


@dataclass
class World:
    """Generators, a trainer and a network with random delays around a real Core.

    Messages between one pair stay in order (as ZeroMQ keeps them); everything else may be reordered.
    """

    core: Core
    random: Random
    steps: int
    generators: int
    loss: float
    """chance that a generator dies after a delivery to it"""
    failure: float
    """chance that a trajectory fails"""
    spread: float
    """ratio of slow to fast episodes"""
    now: float = 0.0
    events: list[tuple[float, int, object]] = field(default_factory=list)
    count: itertools.count = field(default_factory=itertools.count)  # type: ignore[type-arg]
    last_arrival: dict[tuple[bytes, bytes], float] = field(default_factory=dict)
    versions: dict[bytes, int] = field(default_factory=dict)
    received: Counter[bytes] = field(default_factory=Counter)
    lives: Counter[bytes] = field(default_factory=Counter)
    trained: list[int] = field(default_factory=list)
    admitted: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    stored: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """group -> (position, attempt)"""
    running: dict[tuple[int, int], tuple[bytes, msg.Permit, int, int]] = field(default_factory=dict)
    """episodes (group, sample) that run -> generator, permit, version, life"""
    max_lag: int = 0
    finished: bool = False

    def at(self, delay: float, action: object) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.count), action))

    def send(self, sender: bytes, receiver: bytes, action: object) -> None:
        arrival = max(self.now + self.random.expovariate(20.0), self.last_arrival.get((sender, receiver), 0.0))
        self.last_arrival[sender, receiver] = arrival
        heapq.heappush(self.events, (arrival, next(self.count), action))

    def to_buffer(self, peer: bytes, message: msg.Message) -> None:
        self.send(peer, b"", lambda: self.obey(self.core.handle(peer, message, self.now)))

    def obey(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.AddGroup(group=group, split="train"):
                    assert group not in self.admitted
                    self.admitted.add(group)
                    self.ask_again_exactly(effect)
                case do.AddTrajectories(trajectories=many) | do.AddDropped(trajectories=many):
                    for t in many:
                        assert (t.group, t.sample) not in self.stored
                        self.stored[t.group, t.sample] = t
                case do.RefuseGroup(group=group, reason=reason):
                    assert group not in self.refused
                    self.refused[group] = reason
                case do.FormBatch(step=step, groups=groups):
                    self.check_batch(step, groups)
                case do.SendBatch(step=step):
                    self.send(b"", TRAINER, lambda s=step: self.train(s))
                case do.Send(peer=peer, message=message) if peer != TRAINER:
                    life = self.lives[peer]
                    self.send(b"", peer, lambda p=peer, m=message, n=life: self.generator(p, m, n))

    def ask_again_exactly(self, admitted: do.AddGroup) -> None:
        """The prompt order without gap or repeat, or what was dropped, as a further attempt."""
        position, attempt = admitted.position, admitted.attempt
        assert admitted.problem == position, "the problem at this position"
        if attempt == 0:
            assert position == 1 + max((p for p, _ in self.asked.values()), default=-1)
        else:
            before = [group for group, place in self.asked.items() if place == (position, attempt - 1)]
            assert [self.refused[group].split(":")[0] for group in before] in (["stale"], ["rollback"])
        assert (position, attempt) not in self.asked.values()
        self.asked[admitted.group] = position, attempt

    def check_batch(self, step: int, groups: tuple[int, ...]) -> None:
        policy = self.core.rules.policy
        assert len(groups) == policy.groups_per_step
        for group in groups:
            assert group not in self.trained
            assert group not in self.refused
            self.trained.append(group)
            for sample in range(self.core.rules.group_size):
                lag = step - self.stored[group, sample].version_min
                self.max_lag = max(self.max_lag, lag)
                assert lag <= policy.max_staleness, f"group {group} trained {lag} steps after its weights"

    # ------------------------------------------------------------ actors

    def check_prompts(self) -> None:
        """Every position of the prompt order so far is trained, live, waiting to be asked again or refused for
        another reason than its age; in exactly one of these."""
        again = [position for position, _ in self.core.admission.refill]
        live = [self.asked[group][0] for group in self.core.groups]
        trained = [self.asked[group][0] for group in self.trained]
        for_good = [group for group, reason in self.refused.items() if not reason.startswith(("stale", "rollback"))]
        refused = [self.asked[group][0] for group in for_good]
        assert sorted([*again, *live, *trained, *refused]) == list(range(self.core.admission.position))

    def start(self) -> None:
        for i in range(self.generators):
            self.join(b"g%d" % i)
        self.ask(0)

    def join(self, peer: bytes) -> None:
        self.lives[peer] += 1
        self.received[peer] = 0
        self.versions[peer] = self.core.published
        self.to_buffer(peer, msg.Hello(role="generator", name=peer.decode(), pid=1))
        self.want(peer)

    def want(self, peer: bytes) -> None:
        self.to_buffer(peer, msg.Want(limit=self.received[peer] + 3, version=self.versions[peer]))

    def generator(self, peer: bytes, message: msg.Message, life: int) -> None:
        if life != self.lives[peer]:
            return
        match message:
            case msg.NewWeights(version=version):
                self.at(self.random.expovariate(5.0), lambda: self.swap(peer, version, life))
            case msg.Permits(permits=permits):
                if self.random.random() < self.loss:
                    self.lives[peer] += 1
                    self.obey(self.core.lost(peer, self.now))
                    self.at(self.random.expovariate(1.0), lambda: self.join(peer))
                    return
                for permit in permits:
                    self.received[peer] += 1
                    for sample in permit.samples:
                        self.running[permit.group, sample] = peer, permit, self.versions[peer], life
                        seconds = self.random.expovariate(1.0) * self.spread ** self.random.random()
                        version = self.versions[peer]
                        self.at(seconds, lambda p=permit, s=sample, v=version: self.finish(peer, p, s, v, life))
                self.want(peer)
            case msg.Abandon(groups=groups):
                for group, sample in [key for key in self.running if key[0] in groups]:
                    self.stop(group, sample)

    def stop(self, group: int, sample: int) -> None:
        """What there is of an episode that nobody wants."""
        peer, permit, version, life = self.running.pop((group, sample))
        if life == self.lives[peer]:
            done = answer(permit, sample, version, ended="aborted", reason=msg.ABANDONED)
            self.to_buffer(peer, msg.Finished(trajectories=(done,)))

    def swap(self, peer: bytes, version: int, life: int) -> None:
        if life == self.lives[peer] and version > self.versions[peer]:
            self.versions[peer] = version
            self.to_buffer(peer, msg.Holds(version=version))

    def finish(self, peer: bytes, permit: msg.Permit, sample: int, version: int, life: int) -> None:
        if life != self.lives[peer] or (permit.group, sample) not in self.running:
            return
        del self.running[permit.group, sample]
        ended = "error" if self.random.random() < self.failure else "finished"
        done = answer(permit, sample, version, ended=ended)
        self.to_buffer(peer, msg.Finished(trajectories=(done,)))
        if self.random.random() < 0.05:  # a message that comes twice changes nothing
            self.to_buffer(peer, msg.Finished(trajectories=(done,)))

    def ask(self, step: int) -> None:
        if step >= self.steps:
            self.finished = True
            return
        self.to_buffer(TRAINER, msg.NextBatch(step=step))
        if self.random.random() < 0.2:
            self.to_buffer(TRAINER, msg.NextBatch(step=step))

    def train(self, step: int) -> None:
        if step + 1 > getattr(self, "trained_to", 0):
            self.trained_to = step + 1
            self.at(self.random.expovariate(2.0), lambda: self.publish(step + 1))

    def publish(self, version: int) -> None:
        self.to_buffer(TRAINER, msg.Published(version=version))
        self.ask(version)

    def run(self) -> None:
        self.start()
        events = 0
        while self.events and not self.finished:
            self.now, _, action = heapq.heappop(self.events)
            action()  # type: ignore[operator]
            events += 1
            assert events < 200_000, "the world goes on without getting anywhere"
        assert self.finished, f"deadlock: {self.core.wait_reason(self.now)}"


@st.composite
def paces(draw: st.DrawFn) -> PacePolicy:
    p, k = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    return PacePolicy(
        groups_per_step=p,
        max_staleness=k,
        pipeline_depth=draw(st.floats(1, k + 1)),
        window=draw(st.integers(1, k * p + 1)),
    )


@st.composite
def waits(draw: st.DrawFn) -> WaitPolicy:
    k = draw(st.integers(0, 4))
    return WaitPolicy(
        groups_per_step=draw(st.integers(1, 6)), max_staleness=k, pipeline_depth=draw(st.floats(1, k + 1))
    )


@st.composite
def drops(draw: st.DrawFn) -> DropPolicy:
    k = draw(st.integers(0, 4))
    return DropPolicy(
        groups_per_step=draw(st.integers(1, 6)), max_staleness=k, pipeline_depth=draw(st.floats(1, k + 1))
    )


def policies() -> st.SearchStrategy[Policy]:
    return st.one_of(paces(), waits(), drops())
