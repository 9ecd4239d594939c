"""Reads a workload off a run that was made: lengths, decoding speed by concurrency, training time."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import inf
from statistics import median

import numpy as np

from async_rl.buffer.store_reader import GroupRow, StoreReader, TrajectoryRow
from async_rl.errors import UserError
from async_rl.instruments.simulate import MESSAGE_S, UPDATE_S, Workload
from async_rl.run_folder import RunFolder, read_rows

FEWEST_STEPS = 10
"""a run that is to be copied has at least so many"""
SKIPPED = 0.1
"""share of a run's steps at its start that are left out: everything is new then"""


def workload_of(folder: RunFolder) -> Workload:
    """The workload of a run. Raises UserError."""
    rows = list(read_rows(folder.metrics))
    if len(rows) < FEWEST_STEPS:
        raise UserError(f"{folder.path} has trained {len(rows)} steps; copying a run needs {FEWEST_STEPS} at least")
    rows = rows[int(len(rows) * SKIPPED) :]
    with StoreReader(folder.store) as store:
        groups = {row.group: row for row in store.groups()}
        trained_at = {batch.step + 1: batch.trained_at for batch in store.batches()}
        trajectories = [row for row in store.trajectories() if row.ended not in ("error", "aborted")]
    lengths: dict[int, list[int]] = defaultdict(list)
    for row in trajectories:
        if row.split == "train" and row.policy_length:
            lengths[row.group].append(row.policy_length)
    between = [b["time"] - a["time"] - b["time/wait_for_batch"] for a, b in pairwise(rows)]
    fixed, per_step, per_sequence = decoding(trajectories, groups)
    return Workload(
        groups=[tuple(found) for found in lengths.values()],
        decode_s=per_step,
        decode_s_per_sequence=per_sequence,
        episode_s=fixed,
        train_s=between,
        update_s=max(0.0, update_delay(groups.values(), trained_at) - 2 * MESSAGE_S) or UPDATE_S,
        message_s=MESSAGE_S,
    )


def update_delay(groups: Iterable[GroupRow], trained_at: Mapping[int, float | None]) -> float:
    """Seconds from the publication of weights until a generator was given a group under them, the median over versions.
    Where generators are held back for other reasons this is longer than the update takes, and the simulation errs on
    the slow side; 0 when nothing is known."""
    first: dict[int, float] = {}
    for row in groups:
        if row.split == "train" and row.attempt == 0:
            version = row.admitted_version
            first[version] = min(row.admitted_at, first.get(version, inf))
    delays = [first[version] - at for version, at in trained_at.items() if at is not None and version in first]
    return max(0.0, median(delays)) if delays else 0.0


def decoding(trajectories: Sequence[TrajectoryRow], groups: dict[int, GroupRow]) -> tuple[float, float, float]:
    """(seconds of an episode without tokens, of a decoding step, of it for each sequence), the least squares of

        duration = fixed + tokens * (step + sequence * mean number of sequences beside it)

    over all episodes, the mean over the time of the episode on its generator."""
    by_generator: dict[str, list[TrajectoryRow]] = defaultdict(list)
    for row in trajectories:
        if row.policy_length and row.finished_at > row.started_at:
            by_generator[groups[row.group].generator].append(row)
    table, durations = [], []
    for rows in by_generator.values():
        concurrency = Concurrency(rows)
        for row in rows:
            duration = row.finished_at - row.started_at
            beside = concurrency.mean(row.started_at, row.finished_at)
            table.append((1.0, row.policy_length, row.policy_length * beside))
            durations.append(duration)
    if not table:
        raise UserError("the run has no finished episode to measure decoding by")
    return _not_negative(np.array(table), np.array(durations))


class Concurrency:
    """The number of episodes that ran on one generator, integrated over time."""

    def __init__(self, rows: Sequence[TrajectoryRow]) -> None:
        changes = sorted([(row.started_at, 1) for row in rows] + [(row.finished_at, -1) for row in rows])
        self.times = [changes[0][0]]
        self.integral = [0.0]
        self.running = [0]
        for at, change in changes:
            self.integral.append(self.integral[-1] + self.running[-1] * (at - self.times[-1]))
            self.times.append(at)
            self.running.append(self.running[-1] + change)

    def mean(self, start: float, end: float) -> float:
        return (self._until(end) - self._until(start)) / (end - start)

    def _until(self, at: float) -> float:
        place = bisect_right(self.times, at) - 1
        return self.integral[place] + self.running[place] * (at - self.times[place])


def _not_negative(table: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """Least squares over the columns; one that comes out negative is left out."""
    columns = list(range(table.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(table[:, columns], wanted, rcond=None)
        bad = [column for column, value in zip(columns, found, strict=True) if value < 0]
        if not bad:
            values = dict(zip(columns, found.tolist(), strict=True))
            return values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)
        columns.remove(bad[-1])
