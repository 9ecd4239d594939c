"""What durability costs, and how fast a buffer comes back. Prints one JSON object.

    python bench/durability.py [--steps N] [--trajectories N] [--folder DIR]

A run of the quickstart (checkpoints every 50 steps, as it has them). From it, as shares of a step's wall time:
processor seconds of the buffer process in writes and commits to the store (beside the training step, but taken
from it where all cores are busy), and wall seconds of the trainer in checkpoints and in checksums of its weights.
Then a store of many trajectories, read back into a state machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from async_rl.buffer.build import make_core
from async_rl.buffer.core import Core
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.store import Store
from async_rl.config import Settings, load_settings
from async_rl.observe.console import Console
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.build import make_learner
from async_rl.trainer.manifest import list_checkpoints, newest_whole
from async_rl.trainer.team import weights_checksum
from async_rl.trajectory import Trajectory, Turn, VersionSpan

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def cost(settings: Settings, path: Path) -> dict[str, float]:
    """Shares of the training time."""
    summary = run_training(settings, path, console=Console(quiet=True))
    folder = RunFolder(path)
    rows = list(read_rows(folder.metrics))
    steps = len(rows)
    checkpoints = [row["seconds"] for row in read_rows(folder.events) if row["event"] == "checkpoint"]
    learner = make_learner(settings)
    started = time.perf_counter()
    for _ in range(20):
        weights_checksum(learner.weights())
    checksum = (time.perf_counter() - started) / 20
    first, last = rows[0], rows[-1]

    def grown(key: str) -> float:
        return (last[key] - first[key]) / (steps - 1)

    step = summary["seconds"] / steps
    every = settings.checkpoint.every
    checkpoint = sum(checkpoints) / len(checkpoints)
    started = time.perf_counter()
    assert newest_whole(folder.checkpoints)[0] == list_checkpoints(folder.checkpoints)[-1]
    verify = time.perf_counter() - started
    parts = {"store": grown("time/store_processor"), "checkpoint": checkpoint / every, "checksum": checksum}
    return {
        "step_ms": round(1000 * step, 2),
        **{f"{name}_ms_per_step": round(1000 * seconds, 3) for name, seconds in parts.items()},
        **{f"{name}_share": round(seconds / step, 5) for name, seconds in parts.items()},
        "durability_share": round(sum(parts.values()) / step, 5),
        "commits_per_step": round(grown("store/commits"), 1),
        "store_wall_ms_per_step": round(1000 * grown("time/store"), 3),
        "inside_the_step_share": round((parts["checkpoint"] + parts["checksum"]) / step, 5),
        "checkpoint_ms": round(1000 * checkpoint, 1),
        "checkpoint_verify_ms": round(1000 * verify, 1),
    }


def fill(path: Path, trajectories: int, size: int, per_step: int) -> None:
    """A store after many steps: all but the last groups trained."""
    groups = trajectories // size
    columns = {"tokens": np.arange(24, dtype=np.int32), "log_behaviour": np.full(24, -0.5, np.float32)}
    with Store(path, durability="process", create=True) as store:
        for group in range(groups):
            store.add_group(group=group, problem=0, split="train", admitted_version=0, admitted_at=0.0, generator="g")
            size_now = size if group < groups - 1 else size - 1
            members = [
                Trajectory(
                    group=group,
                    sample=sample,
                    problem=0,
                    split="train",
                    seed=0,
                    reward=float(sample % 2),
                    turns=(Turn(start=4, length=20),),
                    versions=(VersionSpan(version=0, start=4, end=24),),
                    ended="finished",
                    **columns,
                )
                for sample in range(size_now)
            ]
            store.add_trajectories(members)
            if group % per_step == per_step - 1 and group < groups - per_step:
                store.form_batch(step=group // per_step, groups=range(group - per_step + 1, group + 1), formed_at=0.0)
                store.commit()
        store.commit()


def recovery(settings: Settings, path: Path, trajectories: int) -> dict[str, float]:
    size, per_step = settings.batch.group_size, settings.batch.groups_per_step
    fill(path, trajectories, size, per_step)
    seconds = []
    for _ in range(3):
        core: Core = make_core(settings, train_problems=1000, vocabulary=0)
        started = time.perf_counter()
        with Store(path, durability="process", create=False) as store:
            store.rewind(version=0, now=0.0)
            store.commit()
            restore(core, read_state(store), version=0)
        seconds.append(time.perf_counter() - started)
        assert core.groups
        assert core.admission.orphans
    return {
        "recovery_trajectories": trajectories,
        "recovery_s": round(max(seconds), 4),
        "recovery_live_groups": len(core.groups),
        "recovery_mb": round(path.stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured")
    arguments = parser.parse_args()
    settings = load_settings(QUICKSTART, [f"trainer.steps={arguments.steps}", "evaluation.every=0"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = {
            **cost(settings, Path(folder) / "run"),
            "target_durability_share": 0.03,
            **recovery(settings, Path(folder) / "large.sqlite", arguments.trajectories),
            "target_recovery_s": 5.0,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
