"""Messages per second through the buffer's state machine. Prints one JSON object.

    python bench/buffer.py [--messages N] [--store]

No sockets and no store: the messages of a whole run are made first (four generators, 64 groups of 16 a step,
max_staleness 4), then the same messages go through a fresh core, five times; rates are per second of one
processor's time. `messages_per_s_with_pool`: the same with a sampler that looks at statistics and each kind of
experience pool (POOLS) at its default size. The mix is that of a run: trajectories in messages of 1 to 4 in random
order of arrival, permits asked for and weights held as they come, counters from every generator, a trainer that
asks a batch ahead.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.depth import Rules
from async_rl.buffer.sampler import SamplerRules
from async_rl.buffer.staleness import PacePolicy
from async_rl.config import default_window
from async_rl.config.pool import PoolSettings
from async_rl.config.sampler import SamplerSettings
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import sample_seed
from async_rl.wire import messages as msg

GENERATORS, GROUPS, GROUP_SIZE, MAX_STALENESS, TOKENS, PROMPT = 4, 64, 16, 4, 512, 64
ROUNDS = 5
TARGET = 20_000
TRAINER = b"trainer"
SAMPLER = SamplerRules(
    chosen=SamplerSettings(choose="thompson", samples="adaptive", turns="adaptive", half_life=8.0),
    seed=0,
    group_size=GROUP_SIZE,
    largest=GROUP_SIZE,
    problems=10_000,
)
POOLS = {
    "groups": PoolSettings(source="groups", share=0.4, max_uses=4),
    "successes": PoolSettings(source="successes", place="replace", when="no_signal"),
    "best": PoolSettings(source="best", place="join", rows=2),
    "signal": PoolSettings(source="priority", place="instead", when="no_signal", rows=4),
    "advantage": PoolSettings(source="priority", priority="advantage", share=0.2),
    "recency": PoolSettings(source="priority", priority="recency", share=0.2),
}
Sent = tuple[bytes, msg.Message, float]


def make_core(sampled: bool = False, pool: str = "") -> Core:
    """`sampled`: with a sampler that looks at statistics wherever it can. `pool`: a name in POOLS."""
    window = default_window(GROUPS, MAX_STALENESS, 0.3)
    pace = PacePolicy(
        groups_per_step=GROUPS, max_staleness=MAX_STALENESS, pipeline_depth=MAX_STALENESS + 1.0, window=window
    )
    rules = Rules(
        policy=pace,
        group_size=GROUP_SIZE,
        temperature=1.0,
        drop_zero_signal=not pool,  # what the pool replaces is trained
        max_failures=10**9,
        max_refusals=10**9,
        seed=0,
        vocabulary=1,
        sampler=SAMPLER if sampled else None,
        pool=POOLS[pool] if pool else PoolSettings(),
    )
    return Core(rules, problem_at=lambda position: position)


@dataclass
class Play:
    """A run without processes; keeps every message that reaches the core."""

    random: Random
    core: Core = field(default_factory=make_core)
    sent: list[Sent] = field(default_factory=list)
    open: dict[bytes, list[tuple[msg.Permit, int]]] = field(default_factory=lambda: defaultdict(list))
    """(permit, sample) that each generator has not finished"""
    received: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))
    version: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))
    batches: deque[int] = field(default_factory=deque)
    tokens = np.zeros(TOKENS, np.int32)
    log_behaviour = np.full(TOKENS, -0.5, np.float32)

    def send(self, peer: bytes, message: msg.Message) -> None:
        now = len(self.sent) * 1e-4
        self.sent.append((peer, message, now))
        for effect in self.core.handle(peer, message, now):
            match effect:
                case do.SendBatch(step=step):
                    self.batches.append(step)
                case do.Send(peer=to, message=msg.Permits(permits=permits)):
                    self.received[to] += len(permits)
                    self.open[to] += [(p, sample) for p in permits for sample in p.samples]
                    self.want(to)
                case do.Send(peer=to, message=msg.NewWeights(version=version)) if version:
                    self.version[to] = version
                    self.send(to, msg.Holds(version=version))

    def want(self, peer: bytes) -> None:
        self.send(peer, msg.Want(limit=self.received[peer] + GROUPS, version=self.version[peer]))

    def finish(self, peer: bytes) -> None:
        """1 to 4 trajectories in any order."""
        mine = self.open[peer]
        done = []
        for _ in range(min(len(mine), self.random.randint(1, 4))):
            place = self.random.randrange(len(mine))
            mine[place], mine[-1] = mine[-1], mine[place]
            done.append(self.trajectory(*mine.pop(), self.version[peer]))
        self.send(peer, msg.Finished(trajectories=tuple(done)))

    def trajectory(self, permit: msg.Permit, sample: int, version: int) -> Trajectory:
        return Trajectory(
            group=permit.group,
            sample=sample,
            problem=permit.problem,
            split="train",
            seed=sample_seed(permit.seed, sample),
            tokens=self.tokens,
            log_behaviour=self.log_behaviour,
            turns=tuple(Turn(start=PROMPT + 112 * turn, length=100) for turn in range(4)),
            versions=(VersionSpan(version=version, start=PROMPT, end=TOKENS),),
            # one group in ten has no signal and is refused
            reward=float(permit.group % 10 != 0 and self.random.random() < 0.5),
            ended="finished",
        )

    def run(self, messages: int) -> list[Sent]:
        peers = [b"generator-%d" % i for i in range(GENERATORS)]
        for peer in peers:
            self.send(peer, msg.Hello(role="generator", name=peer.decode(), pid=1))
            self.want(peer)
        self.send(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1))
        self.send(TRAINER, msg.NextBatch(step=0))
        while len(self.sent) < messages:
            busy = [peer for peer in peers if self.open[peer]]
            # training a step takes about as long as 400 messages of generators
            if self.batches and (not busy or self.random.random() < 1 / 400):
                step = self.batches.popleft()
                self.send(TRAINER, msg.NextBatch(step=step + 1))
                self.send(TRAINER, msg.Published(version=step + 1))
            elif self.random.random() < 0.01:
                peer = self.random.choice(peers)
                self.send(peer, self.status(peer))
            else:
                assert busy, "nobody has anything to do"
                self.finish(self.random.choice(busy))
        return self.sent

    def status(self, peer: bytes) -> msg.Status:
        """The whole standing of a generator."""
        return msg.Status(
            name=peer.decode(),
            version=self.version[peer],
            limit=self.received[peer] + GROUPS,
            groups=tuple({permit.group for permit, _ in self.open[peer]}),
            busy_seconds=1.0,
            wall_seconds=1.0,
            tokens_generated=len(self.sent) * 100,
            running=64,
            waiting=0,
        )


def replay(sent: list[Sent], sampled: bool = False, pool: str = "") -> float:
    """Processor seconds for all messages on a fresh core."""
    core = make_core(sampled, pool)
    handle = core.handle
    started = time.process_time()
    for peer, message, now in sent:
        handle(peer, message, now)
    seconds = time.process_time() - started
    assert core.step > 0
    return seconds


def with_pool(name: str, messages: int) -> int:
    """Messages per second with a sampler and this pool."""
    sent = Play(Random(0), make_core(sampled=True, pool=name)).run(messages)
    return round(len(sent) / statistics.median(replay(sent, sampled=True, pool=name) for _ in range(ROUNDS)))


def microseconds(sent: list[Sent]) -> dict[str, dict[str, float]]:
    """Count, mean and 99th percentile of each kind, measured one by one (the clock's cost included)."""
    core = make_core()
    taken: dict[str, list[float]] = defaultdict(list)
    for peer, message, now in sent:
        started = time.perf_counter()
        core.handle(peer, message, now)
        taken[type(message).__name__].append(1e6 * (time.perf_counter() - started))
    return {
        kind: {
            "messages": len(values),
            "mean_us": round(statistics.fmean(values), 1),
            "p99_us": round(sorted(values)[int(0.99 * (len(values) - 1))], 1),
        }
        for kind, values in sorted(taken.items())
    }


def store_rates() -> dict[str, Any]:
    """What bench/store.py measures of the durable store."""
    script = Path(__file__).with_name("store.py")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        command = [sys.executable, str(script), "--folder", folder, "--groups", "64"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--store", action="store_true", help="measure the store as well (bench/store.py)")
    arguments = parser.parse_args()
    play = Play(Random(0))
    sent = play.run(arguments.messages)
    gc.freeze()  # a buffer does not keep a run's messages for the collector to look through
    with_sampler = Play(Random(0), make_core(sampled=True)).run(arguments.messages)
    pooled = {name: with_pool(name, arguments.messages) for name in POOLS}
    pairs = [(replay(sent), replay(with_sampler, sampled=True)) for _ in range(ROUNDS)]
    seconds, seconds_sampled = [list(some) for some in zip(*pairs, strict=True)]
    trajectories = sum(len(m.trajectories) for _, m, _ in sent if isinstance(m, msg.Finished))
    result: dict[str, Any] = {
        "messages_per_s": round(len(sent) / statistics.median(seconds)),
        "messages_per_s_all": [round(len(sent) / s) for s in seconds],
        "target_messages_per_s": TARGET,
        "messages_per_s_with_sampler": round(len(with_sampler) / statistics.median(seconds_sampled)),
        "messages_per_s_with_pool": pooled,
        "trajectories_per_s": round(trajectories / statistics.median(seconds)),
        "messages": len(sent),
        "steps": play.core.step,
        "groups_refused": play.core.counts["groups_refused"],
        "kinds": microseconds(sent),
        "generators": GENERATORS,
        "groups_per_step": GROUPS,
        "group_size": GROUP_SIZE,
        "max_staleness": MAX_STALENESS,
    }
    if arguments.store:
        result["store"] = store_rates()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
