"""Durable MB/s of the trajectory store. Prints one JSON object.

    python bench/store.py [--folder DIR] [--groups N]

2,000-token trajectories in groups of 16, committed 16 groups at a time, closing included. Beside it: the
same bytes appended to a plain file with an fdatasync per commit, in the same run (best of 3 each). And the bytes
of groups of 8 with a prompt of 512 tokens and answers of 64 that arrive sample by sample: each by itself, on the
wire, in the store, and in the batch that is sent to the trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from async_rl.buffer.store import Durability, Store
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import pack
from async_rl.wire.frames import encode
from async_rl.wire.messages import Batch, Finished

TOKENS, PROMPT, GROUP_SIZE, GROUPS_PER_COMMIT = 2000, 100, 16, 16


def trajectory(group: int, sample: int) -> Trajectory:
    log_behaviour = np.full(TOKENS, -0.5, dtype=np.float32)
    log_behaviour[:PROMPT] = 0.0
    return Trajectory(
        group=group,
        sample=sample,
        problem=group,
        split="train",
        seed=group,
        tokens=np.arange(TOKENS, dtype=np.int32),
        log_behaviour=log_behaviour,
        turns=(Turn(start=PROMPT, length=TOKENS - PROMPT),),
        versions=(VersionSpan(version=1, start=PROMPT, end=TOKENS),),
        reward=1.0,
        ended="finished",
        generator="generator-0",
    )


def store_seconds(path: Path, groups: list[list[Trajectory]], durability: Durability) -> float:
    """From the first write to the closed file."""
    started = time.perf_counter()
    with Store(path, durability=durability, create=True) as store:
        for number, members in enumerate(groups):
            store.add_group(
                group=number,
                problem=number,
                split="train",
                admitted_version=0,
                admitted_at=0.0,
                generator="g",
            )
            store.add_trajectories(members)
            if number % GROUPS_PER_COMMIT == GROUPS_PER_COMMIT - 1:
                store.commit()
        store.commit()
    return time.perf_counter() - started


def file_seconds(path: Path, num_bytes: int, commits: int) -> float:
    part = os.urandom(num_bytes // commits)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(commits):
            file.write(part)
            os.fdatasync(file.fileno())
    return time.perf_counter() - started


def shared_bytes(folder: Path, *, prompt: int, answer: int, size: int, groups: int = 16) -> dict[str, int]:
    """Bytes a group."""
    random = np.random.default_rng(0)
    made = []
    for group in range(groups):
        beginning = random.integers(0, 50_000, prompt, dtype=np.int32)
        for sample in range(size):
            tokens = np.concatenate((beginning, random.integers(0, 50_000, answer, dtype=np.int32)))
            log = np.where(np.arange(len(tokens)) < prompt, 0.0, -0.5).astype(np.float32)
            turns, spans = (
                (Turn(start=prompt, length=answer),),
                (VersionSpan(version=1, start=prompt, end=len(tokens)),),
            )
            one = replace(trajectory(group, sample), tokens=tokens, log_behaviour=log, turns=turns, versions=spans)
            made.append(one)
    folder.mkdir()
    with Store(folder / "shared.sqlite", durability="process", create=True) as store:
        for group in range(groups):
            store.add_group(group=group, problem=0, split="train", admitted_version=0, admitted_at=0.0, generator="g")
        for t in sorted(made, key=lambda t: t.sample):
            store.add_trajectories([t])
        store.form_batch(step=0, groups=list(range(groups)), formed_at=0.0)
        part = store.load_part(0, after=0, most_bytes=1 << 30)
        assert part is not None
        batch = encode(Batch(step=0, blobs=tuple(memoryview(blob) for blob in part[1]), total=len(made)))
        found = {
            "alone": sum(len(pack(t)) for t in made),
            "finished_together": sum(map(len, encode(Finished(trajectories=tuple(made))))),
            "stored": sum(map(len, part[1])),
            "batch_sent": sum(map(len, batch)),
        }
    return {name: count // groups for name, count in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured")
    parser.add_argument("--groups", type=int, default=256)
    arguments = parser.parse_args()
    groups = [[trajectory(g, sample) for sample in range(GROUP_SIZE)] for g in range(arguments.groups)]
    num_bytes = len(pack(groups[0][0])) * GROUP_SIZE * len(groups)
    seconds: dict[str, list[float]] = {"power": [], "process": [], "file": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for attempt in range(3):
            for durability in ("power", "process"):
                path = Path(folder) / f"{durability}-{attempt}.sqlite"
                seconds[durability].append(store_seconds(path, groups, durability))
            commits = max(1, len(groups) // GROUPS_PER_COMMIT)
            seconds["file"].append(file_seconds(Path(folder) / f"{attempt}.raw", num_bytes, commits))
        shared = {
            f"prompt {prompt}, answer {answer}": shared_bytes(Path(folder) / name, prompt=prompt, answer=answer, size=8)
            for name, (prompt, answer) in (("a", (512, 64)), ("b", (45, 15)), ("c", (200, 2000)))
        }
    rate = {name: num_bytes / 1e6 / min(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "store_power_mb_per_s": round(rate["power"], 1),
                "store_process_mb_per_s": round(rate["process"], 1),
                "file_fdatasync_mb_per_s": round(rate["file"], 1),
                "store_power_mb_per_s_all": [round(num_bytes / 1e6 / s, 1) for s in seconds["power"]],
                "target_power_mb_per_s": 100,
                "mb": round(num_bytes / 1e6, 1),
                "bytes_per_token": round(num_bytes / (TOKENS * GROUP_SIZE * len(groups)), 2),
                "trajectories_per_commit": GROUP_SIZE * GROUPS_PER_COMMIT,
                "bytes_a_group_of_8": shared,
            }
        )
    )


if __name__ == "__main__":
    main()
