"""The buffer process stays as large as its budget says, whatever goes through it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support_run import quick_settings

from async_rl.buffer.loop import FEWEST_MESSAGES, divide_memory
from async_rl.config import Settings
from async_rl.process_spec import BufferSpec
from async_rl.run_folder import RunFolder
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, ipc_endpoint
from async_rl.wire.frames import PORTION_BYTES, portions

LONGEST_S = 60.0


def trajectory(permit: msg.Permit, sample: int, version: int, length: int) -> Trajectory:
    return Trajectory(
        group=permit.group,
        sample=sample,
        problem=permit.problem,
        split="train",
        seed=sample_seed(permit.seed, sample),
        tokens=np.full(length, sample, np.int32),
        log_behaviour=np.full(length, -1.0, np.float32),
        turns=(Turn(start=1, length=length - 1),),
        versions=(VersionSpan(version=version, start=0, end=length),),
        reward=float(sample % 2),
        ended="finished",
    )


@dataclass
class Peers:
    """A generator and a trainer that do nothing but talk."""

    settings: Settings
    generator: Dealer
    trainer: Dealer
    lengths: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))
    open: list[msg.Permit] = field(default_factory=list)
    finished: int = 0
    tokens: tuple[int, int] = (50, 4001)
    """of a trajectory: at least, and one more than at most"""

    def begin(self) -> None:
        self.generator.send(msg.Hello(role="generator", name="generator-0", pid=1))
        self.trainer.send(msg.Hello(role="trainer", name="trainer", pid=2))

    def generate(self, version: int) -> None:
        """All groups of one batch, a message for some of them."""
        wanted = self.settings.batch.groups_per_step
        self.generator.send(msg.Want(limit=(version + 1) * wanted, version=version))
        while len(self.open) < wanted:
            self.hear(self.generator, msg.Permits, "permits")
        made = [
            trajectory(permit, sample, version, int(self.lengths.integers(*self.tokens)))
            for permit in self.open[:wanted]
            for sample in permit.samples
        ]
        del self.open[:wanted]
        for some in portions(made):
            self.generator.send(msg.Finished(trajectories=some))
            self.hear(self.generator, msg.Accepted, "an acknowledgement")
        self.finished += len(made)

    def train(self, step: int) -> list[Trajectory]:
        """Fetch the batch part by part; then there are new weights, in a checkpoint."""
        got: list[Trajectory] = []
        total = 1
        while len(got) < total:
            self.trainer.send(msg.NextBatch(step=step, after=len(got)))
            part = self.hear(self.trainer, msg.Batch, f"batch {step}")
            assert isinstance(part, msg.Batch)
            assert part.after == len(got)
            got += part.trajectories
            total = part.total
        self.trainer.send(msg.Published(version=step + 1))
        self.trainer.send(msg.Checkpointed(version=step + 1, oldest=step + 1))
        self.generator.send(msg.Holds(version=step + 1))
        return got

    def hear(self, dealer: Dealer, kind: type, what: str) -> msg.Message:
        while True:
            message = dealer.receive(LONGEST_S, what)
            assert not isinstance(message, msg.Refused | msg.Stop), message
            if isinstance(message, msg.Permits):
                self.open += message.permits
            if isinstance(message, kind):
                return message


def anonymous_mb(pid: int) -> float:
    """Memory of a process that is no file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return quick_settings(
        tmp_path, "batch.groups_per_step=160", "batch.group_size=8", "staleness.max_staleness=0", "buffer.memory_mb=16",
        "buffer.keep_steps=1", "generator.max_sequences=1280",
    )  # fmt: skip


@pytest.fixture
def buffer(tmp_path: Path, settings: Settings) -> Iterator[tuple[Peers, int]]:
    folder = RunFolder(tmp_path / "run")
    folder.create(settings)
    endpoint = ipc_endpoint(folder.path)
    spec = BufferSpec(
        run=str(folder.path), name="buffer", endpoint=endpoint, train_problems=50, vocabulary=100, version=0
    )
    process = subprocess.Popen([sys.executable, "-m", "async_rl.buffer", spec.to_json()])
    try:
        with Dealer(endpoint, "generator-0") as generator, Dealer(endpoint, "trainer") as trainer:
            yield Peers(settings, generator, trainer), process.pid
            trainer.send(msg.Done())
            assert process.wait(LONGEST_S) == 0
    finally:
        process.kill()
        process.wait()


def test_memory_stays_flat_over_ten_thousand_trajectories_and_batches_beyond_the_budget(
    buffer: tuple[Peers, int], settings: Settings
) -> None:
    peers, pid = buffer
    peers.begin()
    grown: list[float] = []
    for step in range(8):
        peers.generate(step)
        batch = peers.train(step)
        assert len(batch) == 1280
        assert sum(t.tokens.nbytes + t.log_behaviour.nbytes for t in batch) > settings.buffer.memory_mb << 20
        assert [t.sample for t in batch] == [*range(8)] * 160
        grown.append(anonymous_mb(pid))
    assert peers.finished == 10_240
    assert grown[-1] - grown[1] < 4.0, f"after 2,560 and after 10,240 trajectories: {grown} MB"


@pytest.mark.nightly
def test_memory_stays_flat_over_fifty_thousand_short_trajectories_once_the_cache_is_full(
    buffer: tuple[Peers, int],
) -> None:
    peers, pid = buffer
    peers.tokens = (10, 40)
    peers.begin()
    grown: list[float] = []
    for step in range(60):
        peers.generate(step)
        assert len(peers.train(step)) == 1280
        grown.append(anonymous_mb(pid))
    assert grown[-1] - grown[19] < 0.5, f"after 25,600 and after 76,800 trajectories: {grown} MB"


def test_the_parts_of_a_budget_fit_into_it() -> None:
    for megabytes in (16, 256, 4096):
        for peers in (1, 3, 200):
            memory = divide_memory(megabytes << 20, peers=peers)
            queued = memory.queued_messages * peers * PORTION_BYTES
            if memory.queued_messages > FEWEST_MESSAGES:
                assert queued + memory.cache_bytes + memory.handled_bytes + 3 * memory.part_bytes <= megabytes << 20
            assert memory.cache_bytes + memory.handled_bytes + 3 * memory.part_bytes <= megabytes << 20


def test_trajectories_leave_in_order_in_messages_of_bounded_size() -> None:
    permit = msg.Permit(group=0, problem=0, split="train", samples=(), seed=0, temperature=1.0)
    made = [trajectory(permit, sample, 0, length) for sample, length in enumerate([10, 90_000, 5, 20_000, 20_000, 1])]
    assert [[t.sample for t in some] for some in portions(made)] == [[0], [1], [2, 3], [4, 5]]
    assert list(portions([])) == []
