"""The audit of a whole run folder: the store, and the files that tell of the same steps."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from async_rl.buffer.store_reader import StoreReader
from async_rl.chaos.audit import Audit, Finding, Promise, audit_store
from async_rl.errors import UserError
from async_rl.rollback import Rollback, read_rollback
from async_rl.run_folder import RunFolder, read_rows
from async_rl.settings import Settings
from async_rl.task import make_task
from async_rl.task.order import PromptOrder
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of


def audit_run(folder: RunFolder) -> Audit:
    """Everything a run left: store, metric rows, evaluations, checkpoints. Raises UserError when it still
    runs, or is no run."""
    if not folder.config.is_file():
        raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
    _refuse_running(folder)
    settings = folder.settings()
    back = read_rollback(folder)
    promise = promise_of(settings, finished=folder.summary.exists(), back=back)
    with StoreReader(folder.store) as store:
        audit = audit_store(store, promise)
        findings = [*audit.findings, *_evaluations(store, list(read_rows(folder.events)), promise)]
    findings += _rows(folder, audit.steps, promise)
    findings += _checkpoints(folder, promise, back)
    told = "" if back is None else f"at step {back.at - 1} to version {back.to} ({back.reason})"
    return dataclasses.replace(audit, findings=tuple(findings), went_back=told)


def promise_of(settings: Settings, *, finished: bool, back: Rollback | None = None) -> Promise:
    task = make_task(settings.task.name, settings.task.args)
    batch, evaluation = settings.batch, settings.evaluation
    problems = min(evaluation.problems, len(task.problems("eval")))
    return Promise(
        groups_per_step=batch.groups_per_step,
        group_size=batch.group_size,
        max_staleness=settings.staleness.max_staleness,
        most_waiting=(settings.staleness.max_staleness + 1) * batch.groups_per_step,
        problem_at=PromptOrder(len(task.problems("train")), settings.seed),
        steps=settings.trainer.steps if finished else None,
        evaluation_size=problems * evaluation.samples,
        went_back=back.at if back is not None else 0,
    )


# ------------------------------------------------------------------------------------------------ files


def _evaluations(
    store: StoreReader, events: Sequence[Mapping[str, Any]], promise: Promise
) -> Iterator[Finding]:
    """Numbered without a gap, reported once, each with all its trajectories, the last one after the last step."""
    reported = [event for event in events if event["event"] == "evaluation"]
    times = Counter(int(event["evaluation"]) for event in reported)
    stored = {row.evaluation: row for row in store.evaluations()}
    for number in range(max(times, default=-1) + 1):
        if times[number] != 1:
            yield Finding(kind="evaluation", what=f"evaluation {number} was reported {times[number]} times")
        elif number not in stored:
            yield Finding(kind="evaluation", what=f"evaluation {number} was reported and is not in the store")
    for number, row in stored.items():
        if len(row.rewards) != promise.evaluation_size:
            yield Finding(
                kind="evaluation",
                what=f"evaluation {number} has {len(row.rewards)} trajectories instead of {promise.evaluation_size}",
            )
    if promise.steps is not None:
        steps = [int(event["step"]) for event in reported]
        for step, when in ((0, "before training"), (promise.steps, "after the last step")):
            if step not in steps:
                yield Finding(kind="evaluation", what=f"there is no evaluation {when}")


def _rows(folder: RunFolder, formed: int, promise: Promise) -> Iterator[Finding]:
    """One metric row a step, and one mark of each kind a version at most, in order."""
    steps = [int(row["step"]) for row in read_rows(folder.metrics)]
    last = promise.steps if promise.steps is not None else min(formed, len(steps))
    times = Counter(steps)
    for step in sorted({*range(last), *times}):
        if times[step] != 1 or step >= last:
            yield Finding(kind="record", what=f"{folder.metrics.name} has step {step} {times[step]} times")
    if any(second < first for first, second in pairwise(steps)):
        yield Finding(kind="record", what=f"{folder.metrics.name} is not in the order of the steps")
    marks = Counter(
        (int(row["version"]), kind) for row in read_rows(folder.weights) for kind in ("hash", "checksum") if kind in row
    )
    for (version, kind), count in marks.items():
        if count > 1:
            what = f"{folder.weights.name} has the {kind} of version {version} {count} times"
            yield Finding(kind="record", what=what)
    if promise.steps is not None and marks[promise.steps, "hash"] == 0:
        yield Finding(kind="record", what=f"{folder.weights.name} has no hash of the last weights")


def _checkpoints(folder: RunFolder, promise: Promise, back: Rollback | None) -> Iterator[Finding]:
    """Every checkpoint is byte for byte what was written; the last one is there; none of a finished run holds
    weights that were given up."""
    found = list_checkpoints(folder.checkpoints)
    for path in found:
        if back is not None and promise.steps is not None and back.to < version_of(path) < back.at:
            yield Finding(kind="checkpoint", what=f"{path.name} holds weights that were given up at step {back.at - 1}")
        if (damage := damage_of(path)) is not None:
            yield Finding(kind="checkpoint", what=f"{path.name}: {damage}")
    if promise.steps is not None and promise.steps not in map(version_of, found):
        yield Finding(kind="checkpoint", what=f"there is no checkpoint of the last version, {promise.steps}")


def _refuse_running(folder: RunFolder) -> None:
    """What is still being written looks torn."""
    if not folder.lock.exists():
        return
    descriptor = os.open(folder.lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder.path}: this run is still going on; audit it when it has ended") from None
    finally:
        os.close(descriptor)
