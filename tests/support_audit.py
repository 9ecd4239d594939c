"""A finished run written by hand, whole, for audits to find defects in."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
from support_run import quick_settings

from async_rl.buffer.store import Store
from async_rl.events import EvaluationReported
from async_rl.observe.audit import promise_of
from async_rl.run_folder import RunFolder, append_row
from async_rl.trainer.manifest import checkpoint_path, write_whole
from async_rl.trajectory import Trajectory, Turn, VersionSpan

STEPS = 4
P = 4
"""groups a step"""
SIZE = 4
"""trajectories a group"""
REFUSED = 6
"""a group"""
WAITING = 2
"""groups in the pipeline at the end"""


def trajectory(group: int, sample: int, version: int, *, split: str = "train", newest: int | None = None) -> Trajectory:
    """Two policy tokens of `version` and one of `newest`."""
    last = version if newest is None else newest
    spans = (VersionSpan(version=version, start=1, end=3), VersionSpan(version=last, start=3, end=4))
    return Trajectory(
        group=group, sample=sample, problem=0, split=split, seed=1,
        tokens=np.arange(4, dtype=np.int32), log_behaviour=np.array([0, -1, -1, -1], np.float32),
        turns=(Turn(start=1, length=3),), versions=spans, reward=float(sample % 2), ended="finished",
    )  # fmt: skip


def write_run(path: Path, model: Path) -> RunFolder:
    """Groups 0, 1, ... in the prompt order; REFUSED is refused, the others are trained P at a time."""
    settings = quick_settings(model, f"trainer.steps={STEPS}")
    folder = RunFolder(path)
    folder.create(settings)
    promise = promise_of(settings, finished=True)
    groups = [group for group in range(STEPS * P + 1) if group != REFUSED]
    last = groups[-1] + WAITING
    with Store(folder.store, durability="process", create=True) as store:
        for group in range(last + 1):
            store.add_group(
                group=group, problem=promise.problem_at(group), split="train", position=group, attempt=0,
                admitted_version=STEPS - 1 if group > groups[-1] else 0, admitted_at=0.0, generator="generator-0",
            )  # fmt: skip
        for step in range(STEPS):
            batch = groups[step * P : (step + 1) * P]
            version = max(0, step - 1)
            store.add_trajectories([trajectory(group, sample, version) for group in batch for sample in range(SIZE)])
            store.form_batch(step=step, groups=batch, formed_at=1.0)
            store.mark_trained(step=step, trained_at=2.0)
        store.refuse_group(REFUSED, "zero_signal")
        store.mark_consumed(step=STEPS - 1)
        for number in (0, 1):
            rewards = [1.0] * promise.evaluation_size
            store.add_evaluation(evaluation=number, rewards=rewards, version_min=0, version_max=0, finished_at=3.0)
        store.commit()
    for step in range(STEPS):
        append_row(folder.metrics, {"step": step})
    for version in range(STEPS + 1):
        append_row(folder.weights, {"version": version, "hash": "0"})
    for number, step in ((0, 0), (1, STEPS)):
        folder.record(reported(number, step))
    write_whole(checkpoint_path(folder.checkpoints, STEPS), lambda into: replace_weights(into, b"whole"))
    folder.summary.write_text(json.dumps({"steps": STEPS}))
    return folder


def replace_weights(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)


def change(folder: RunFolder, *statements: str) -> None:
    """SQL on the store, as nothing of ours would do it."""
    connection = sqlite3.connect(folder.store)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def put_batch(folder: RunFolder, step: int, groups: list[int]) -> None:
    change(folder, f"UPDATE batches SET groups = '{json.dumps(groups)}' WHERE step = {step}")


def put_trajectory(folder: RunFolder, group: int, sample: int, version: int, newest: int | None = None) -> None:
    """In the place of the one that is there; the columns beside it stay as they are."""
    from async_rl.trajectory.codec import pack

    made = trajectory(group, sample, version, newest=newest)
    connection = sqlite3.connect(folder.store)
    connection.execute(
        "UPDATE payloads SET payload = ? WHERE id = (SELECT id FROM trajectories WHERE group_id = ? AND sample = ?)",
        (pack(made), group, sample),
    )
    connection.commit()
    connection.close()


def reported(evaluation: int, step: int) -> EvaluationReported:
    """That an evaluation is complete."""
    return EvaluationReported(
        evaluation=evaluation, step=step, reward=1.0, trajectories=4, version_min=0, version_max=0
    )
