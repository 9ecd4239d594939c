"""A hundred thousand inputs that nobody sound would send: each is refused, counted, forgotten; the run goes on."""

from __future__ import annotations

import gc
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import zmq
from support_buffer import TRAINER, answer, make_core
from support_hostile import KINDS, forged, frames_of, some_frames, some_message

from async_rl.buffer import effects as do
from async_rl.buffer.acceptance import EXAMPLES
from async_rl.buffer.core import Core
from async_rl.buffer.loop import execute, receive, write
from async_rl.buffer.staleness import PacePolicy
from async_rl.buffer.store import Store
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router, WireTimeout
from async_rl.wire.frames import REFUSALS, decode, encode

SOUND = (b"g0", b"g1", b"g2")
ATTACKERS = (b"", b"\xff" * 255, b"h0", b"h1", b"g9")
PACE = PacePolicy(groups_per_step=3, max_staleness=2, pipeline_depth=3.0, window=2)
VOCABULARY = 100


@dataclass
class Siege:
    """A buffer with three sound generators and a trainer, among attackers."""

    random: Random
    store: Store | None
    attackers: tuple[bytes, ...] = ATTACKERS
    core: Core = field(init=False)
    now: float = 0.0
    inputs: int = 0
    decoded: int = 0
    open: dict[bytes, list[tuple[msg.Permit, int]]] = field(default_factory=dict)
    received: dict[bytes, int] = field(default_factory=dict)
    versions: dict[bytes, int] = field(default_factory=dict)
    batch: int = -1
    """step of the batch the trainer holds"""
    done: list[Trajectory] = field(default_factory=list)
    """sent before"""
    stored: set[tuple[int, int]] = field(default_factory=set)
    acknowledged: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.core = make_core(PACE, vocabulary=VOCABULARY, max_permits=4)
        for peer in SOUND:
            self.open[peer], self.received[peer], self.versions[peer] = [], 0, 0
            self.say(peer, msg.Hello(role="generator", name=peer.decode(), pid=1))
            self.want(peer)
        self.say(TRAINER, msg.NextBatch(step=0))

    # ------------------------------------------------------------ sound peers

    def say(self, peer: bytes, message: msg.Message) -> None:
        for effect in self.execute(self.core.handle(peer, decode(encode(message)), self.now)):
            match effect:
                case do.Send(peer=to, message=msg.Permits(permits=permits)) if to in SOUND:
                    self.received[to] += len(permits)
                    self.open[to] += [(permit, sample) for permit in permits for sample in permit.samples]
                case do.Send(peer=to, message=msg.NewWeights(version=version)) if to in SOUND:
                    self.versions[to] = max(self.versions[to], version)
                case do.Send(peer=to, message=msg.Accepted(pairs=pairs)) if to in SOUND:
                    self.acknowledged |= set(pairs)
                case do.Send(peer=to, message=msg.Refused() as refused):
                    raise AssertionError(f"{to!r} was refused: {refused}")
                case do.SendBatch(peer=to, step=step) if to == TRAINER:
                    self.batch = step

    def want(self, peer: bytes) -> None:
        self.say(peer, msg.Want(limit=self.received[peer] + 4, version=self.versions[peer]))

    def go_on(self) -> None:
        """Something sound happens."""
        if self.batch >= 0 and self.random.random() < 0.3:
            step, self.batch = self.batch, -1
            self.say(TRAINER, msg.Published(version=step + 1))
            self.say(TRAINER, msg.Checkpointed(version=step + 1))
            self.say(TRAINER, msg.NextBatch(step=step + 1))
            for peer in SOUND:
                self.say(peer, msg.Holds(version=self.versions[peer]))
        peer = self.random.choice(SOUND)
        if self.open[peer]:
            permit, sample = self.open[peer].pop(self.random.randrange(len(self.open[peer])))
            self.done.append(answer(permit, sample, self.versions[peer], reward=float(self.random.random() < 0.5)))
            del self.done[:-50]
            self.say(peer, msg.Finished(trajectories=(self.done[-1],)))
        self.want(peer)

    # -------------------------------------------------------------- attackers

    def attack(self, frames: list[bytes]) -> None:
        """What the buffer process does with frames of anybody."""
        self.inputs += 1
        peer = self.random.choice(self.attackers)
        before = self.core.refusals.counts.total()
        message = received(frames)
        if isinstance(message, WireError):
            self.execute(self.core.malformed(peer, message, self.now))
            assert self.core.refusals.counts.total() == before + 1
            return
        self.decoded += 1
        self.execute(self.core.handle(peer, message, self.now))

    def messages(self) -> list[list[bytes]]:
        """What attackers may have overheard, and bend."""
        true = self.done[-8:]
        held = [answer(permit, sample, 0) for mine in self.open.values() for permit, sample in mine[:2]]
        sent: list[msg.Message] = [msg.Finished(trajectories=(t,)) for t in (*true, *held)]
        sent += [msg.Finished(trajectories=(forged(self.random, t),)) for t in (*true, *held)]
        sent += [msg.Turns(trajectories=(t,)) for t in held]
        sent += [some_message(self.random, kind) for kind in KINDS]
        sent.append(msg.Hello(role="generator", name="h", pid=1))
        sent.append(msg.Want(limit=2, version=0))
        return [frames_of(message) for message in sent]

    def execute(self, effects: list[do.Effect]) -> list[do.Effect]:
        for effect in effects:
            if isinstance(effect, do.AddTrajectories):
                self.stored |= {(t.group, t.sample) for t in effect.trajectories}
            if self.store is not None:
                write(effect, self.store)
            if isinstance(effect, do.Send):
                frames = encode(effect.message)  # whatever is answered can be sent
                assert sum(map(len, frames)) < 1 << 20
            assert not (isinstance(effect, do.EndRun) and effect.failed)
        if self.store is not None:
            self.store.commit()
        return effects

    def run(self, inputs: int) -> None:
        for number in range(inputs):
            if number % 40 == 0:
                overheard = self.messages()
            self.now += 0.001
            self.attack(some_frames(self.random, overheard))
            if number % 8 == 0:
                self.go_on()
            if number % 200 == 0:
                for peer in ATTACKERS:  # they take permits and let them lie
                    self.execute(self.core.lost(peer, self.now))
                self.hand_out()
                check(self.core)

    def hand_out(self) -> None:
        """What was taken from attackers goes to sound generators."""
        for peer in SOUND:
            self.want(peer)


def received(frames: list[bytes]) -> msg.Message | WireError:
    try:
        return decode(frames)
    except WireError as error:
        return error


def check(core: Core) -> None:
    """What holds whatever was said."""
    ledger, admission = core.ledger, core.admission
    numbers = [entry.group for entry in core.ledger.queue.entries]
    assert numbers == sorted(set(numbers))
    assert {entry.group for entry in core.ledger.queue.entries if not entry.trained} == set(ledger.groups)
    assert len(ledger.groups) <= PACE.slots
    assert admission.position == core.counts["groups_admitted"]
    assert core.counts["groups_trained"] == PACE.groups_per_step * core.step
    assert core.published <= core.step
    for number, group in ledger.groups.items():
        assert set(group.samples) <= set(range(group.size))
        assert all(
            0 <= s.version_min <= s.version_max <= core.step or s.policy_length == 0 for s in group.samples.values()
        )
        waits = number in admission.orphans
        assert waits == (group.holder is None and not group.complete)
    for peer, generator in admission.generators.items():
        assert generator.held == sum(
            group.holder == peer
            for group in (*ledger.groups.values(), *(g for _, g in core.evaluations.groups.values()))
        )
    assert core.refusals.counts.keys() <= REFUSALS
    assert decode(encode(core.snapshot(1.0)))


@contextmanager
def siege(seed: int, *, store: bool) -> Iterator[Siege]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        if not store:
            yield Siege(Random(seed), None)
            return
        with Store(Path(folder) / "trajectories.sqlite", durability="process", create=True) as made:
            yield Siege(Random(seed), made)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 8))])
def test_fifteen_thousand_inputs_of_attackers_change_nothing_for_the_others(seed: int) -> None:
    with siege(seed, store=seed == 0) as world:
        world.run(15_000)
        assert world.decoded > 2_000
        assert len(world.core.refusals.counts) > 12, "nearly every reason was met"
        step = world.core.step
        assert step > 50, "sound traffic went on"
        assert world.acknowledged <= world.stored
        for _ in range(400):  # and goes on behind the siege
            world.go_on()
        assert world.core.step > step + 5
        if world.store is not None:
            assert world.store.counts()["batches"] == world.core.step
            assert world.store.counts()["groups_refused"] == world.core.counts["groups_refused"]


def test_whoever_steals_a_name_breaks_nothing_but_what_that_name_may_do() -> None:
    """Attackers speak as the trainer and the generators themselves: no error, and every invariant holds."""
    random, kinds = Random(11), set[str]()
    for life in range(30):
        with siege(life, store=life % 10 == 0) as world:
            for number in range(500):
                world.now += 0.001
                if number % 40 == 0:
                    overheard = world.messages()
                peer = random.choice((*SOUND, TRAINER))
                message = received(some_frames(random, overheard))
                if not isinstance(message, WireError | msg.Done | msg.Shutdown):
                    world.execute(world.core.handle(peer, message, world.now))
                    world.execute(world.core.tick(world.now))
                if number % 25 == 0:
                    check(world.core)
            kinds |= world.core.refusals.counts.keys()
    assert {"version", "number", "permit", "step", "direction"} <= kinds


def held_by_the_buffer() -> int:
    """Bytes that its code has allocated and that are still held; what threads of the test runner do does not count."""
    gc.collect()
    ours = [tracemalloc.Filter(True, f"*/async_rl/{room}/*") for room in ("buffer", "wire", "trajectory")]
    traces = tracemalloc.take_snapshot().filter_traces([*ours, tracemalloc.Filter(True, "<string>")])
    return sum(trace.size for trace in traces.traces)


def test_memory_stays_flat_under_attack() -> None:
    with siege(3, store=False) as world:
        world.run(4000)
        gc.collect()
        tracemalloc.start()
        try:
            world.run(2000)
            world.stored.clear()
            world.acknowledged.clear()
            before = held_by_the_buffer()
            tracemalloc.reset_peak()
            world.run(6000)
            world.stored.clear()  # the test's own
            world.acknowledged.clear()
            _, peak = tracemalloc.get_traced_memory()
            after = held_by_the_buffer()
            whole, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 300_000, "nothing is kept of what was refused"
        assert peak - whole < 30 << 20, "and nothing large is made of it"


def test_the_process_around_it_records_a_few_examples_answers_and_lives_on(tmp_path: Path) -> None:
    """Real sockets: what a stranger sends, and what a monitor is told of it."""
    random, events = Random(5), list[dict[str, object]]()
    core = make_core(PACE, vocabulary=VOCABULARY)
    with (
        Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store,
        Router(f"ipc://{tmp_path}/buffer.sock") as router,
        Dealer(router.endpoint, "monitor") as monitor,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as stranger,
    ):
        stranger.linger = 0  # else what it could not send holds up whoever closes it
        stranger.connect(router.endpoint)
        for _ in range(500):
            stranger.send_multipart(some_frames(random, [frames_of(msg.Query())]) or [b""])
        snapshot = None
        deadline = time.monotonic() + 30
        while snapshot is None and time.monotonic() < deadline:
            effects = receive(router, core, 1 << 20)
            execute(effects, store, router, lambda event: events.append(event.detail()), part_bytes=1 << 20)
            if core.refusals.counts.total() > 200:
                monitor.send(msg.Query())
            with suppress(WireTimeout):
                snapshot = monitor.receive(0.0, "the snapshot")
    assert isinstance(snapshot, msg.Snapshot)
    assert sum(snapshot.refused.values()) > 200
    examples = Counter(str(row["kind"]) for row in events)
    assert examples.keys() == core.refusals.counts.keys()
    assert max(examples.values()) <= EXAMPLES
