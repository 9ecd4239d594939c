"""Coverage-guided fuzzing of what arrives at the buffer, with atheris (pip install atheris).

    python bench/fuzz_wire.py [-max_total_time=SECONDS] [any option of libFuzzer]

Each input is cut into frames, decoded, and what is a message is handled by a state machine (with a sampler and a pool,
every other one) that has heard of a trainer and a generator, under the name of one of them or of a stranger. The search
begins with a message of each kind and with groups that share their beginnings. `WireError` is the only exception there
may be; libFuzzer writes an input that raises another one, takes too long or too much memory into the current folder.
Ends with exit code 0 when there was none.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

with atheris.instrument_imports(include=["async_rl"]):
    from async_rl.buffer.core import Core
    from async_rl.buffer.depth import Rules
    from async_rl.buffer.sampler import SamplerRules
    from async_rl.buffer.staleness import PacePolicy
    from async_rl.config.pool import PoolSettings
    from async_rl.config.sampler import SamplerSettings
    from async_rl.trajectory import Trajectory, Turn, VersionSpan
    from async_rl.trajectory.codec import WireError
    from async_rl.wire import messages as msg
    from async_rl.wire.frames import decode, encode

import numpy as np
from msgspec.structs import replace
from support_hostile import KINDS, some_message

PEERS = (b"trainer", b"generator-0", b"stranger")
LONGEST_INPUT = 4096
LIMITS = ("-rss_limit_mb=2048", "-timeout=10", f"-max_len={LONGEST_INPUT}")


SAMPLER = SamplerRules(
    chosen=SamplerSettings(choose="thompson", samples="adaptive", turns="adaptive", start="success"),
    seed=0,
    group_size=2,
    largest=4,
    problems=10,
)
POOL = PoolSettings(source="best", place="join", rows=2)


def fresh_core(number: int = 0) -> Core:
    """`number`: odd ones have a sampler and a pool."""
    more = {"sampler": SAMPLER, "pool": POOL} if number % 2 else {}
    rules = Rules(
        policy=PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1),
        group_size=2,
        temperature=1.0,
        drop_zero_signal=True,
        max_failures=10**9,
        max_refusals=10**9,
        seed=0,
        vocabulary=100,
        max_permits=4,
        **more,  # type: ignore[arg-type]
    )
    core = Core(rules, problem_at=lambda position: position)
    core.handle(b"trainer", msg.Hello(role="trainer", name="trainer", pid=1), 0.0)
    core.handle(b"generator-0", msg.Hello(role="generator", name="generator-0", pid=1), 0.0)
    core.handle(b"generator-0", msg.Want(limit=4, version=0), 0.0)
    return core


def examples() -> list[msg.Message]:
    """Where the search begins."""
    done = Trajectory(
        group=0,
        sample=0,
        problem=0,
        split="train",
        seed=1,
        tokens=np.array([1, 2, 3], np.int32),
        log_behaviour=np.array([0.0, -1.0, -1.0], np.float32),
        turns=(Turn(start=1, length=2, reward=1.0),),
        versions=(VersionSpan(version=0, start=1, end=3),),
        reward=1.0,
        ended="finished",
        info={"a": 1.0},
    )
    long = replace(
        done,
        tokens=np.arange(80, dtype=np.int32),
        log_behaviour=np.concatenate((np.zeros(70, np.float32), np.full(10, -1.0, np.float32))),
        turns=(Turn(start=70, length=10),),
        versions=(VersionSpan(version=0, start=70, end=80),),
    )
    alike = tuple(replace(long, sample=sample) for sample in range(3))  # two of them are sent cut
    return [
        *(some_message(Random(number), kind) for number, kind in enumerate(KINDS)),
        msg.Finished(trajectories=alike),
        msg.Turns(trajectories=alike[:2]),
        msg.Hello(role="generator", name="generator-1", pid=1, joined=True),
        msg.Want(limit=2, version=0),
        msg.Finished(trajectories=(done, done)),
        msg.Turns(trajectories=(done,)),
        msg.Canary(name="generator-0", version=0, digests=(("w", 1),), log_probs=(-0.5,)),
        msg.NextBatch(step=0),
        msg.Evaluate(evaluation=0, version=0, problems=(1, 2), samples=1, temperature=1.0),
        msg.FetchEvaluation(evaluation=0),
        msg.Query(),
        msg.LinkCall(number=1, method="init", version=-1, detail={"a": [1, {"b": None}]}),
    ]


def joined(peer: int, message: msg.Message) -> bytes:
    """The input that stands for this message."""
    frames = [bytes(frame) for frame in encode(message)]
    return bytes([peer]) + b"".join(struct.pack("<H", len(frame)) + frame for frame in frames)


def cut(data: bytes) -> list[bytes]:
    frames, at = [], 1
    while at + 2 <= len(data):
        (length,) = struct.unpack_from("<H", data, at)
        frames.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return frames


class Target:
    def __init__(self) -> None:
        self.core = fresh_core()
        self.inputs = 0

    def __call__(self, data: bytes) -> None:
        self.inputs += 1
        peer = PEERS[data[0] % len(PEERS)] if data else PEERS[-1]
        now = 0.001 * self.inputs
        try:
            message = decode(cut(data))
        except WireError as error:
            self.core.malformed(peer, error, now)
            return
        self.core.handle(peer, message, now)
        if self.core.ended or self.inputs % 1000 == 0:
            self.core = fresh_core(self.inputs // 1000)


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, message in enumerate(examples()):
            for peer in range(len(PEERS)):
                (Path(corpus) / f"{number}-{peer}").write_bytes(joined(peer, message))
        atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[1:], corpus], Target())
        atheris.Fuzz()


if __name__ == "__main__":
    main()
