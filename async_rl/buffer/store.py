"""The durable record of a run: one SQLite file that any SQL tool can open, also while the run goes on.

Writes are gathered in one transaction and made durable by `commit()`; a peer that is told that something is stored is
told after the commit. One process writes (a lock on the file sees to that); readers never block it. Payloads are blobs
of trajectory/codec.py; what the samples of a group begin with alike is in one of them (trajectory/beginnings.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any, Literal, TypeVar

from async_rl.buffer.pool_store import PoolWriter
from async_rl.buffer.recent import Recent
from async_rl.buffer.sampler_rows import SamplerWriter
from async_rl.buffer.store_reader import (
    APPLICATION_ID,
    PAGE_BYTES,
    SCHEMA,
    TABLES,
    BatchRow,
    EvaluationRow,
    GroupRow,
    StoreError,
    StoreReader,
    TrajectoryRow,
    connect,
    explained,
)
from async_rl.errors import UserError
from async_rl.trajectory.beginnings import Beginnings
from async_rl.trajectory.codec import Blob, pack
from async_rl.trajectory.types import Trajectory

__all__ = ["BatchRow", "EvaluationRow", "GroupRow", "Store", "StoreError", "StoreReader", "TrajectoryRow"]

Durability = Literal["process", "power"]
"""what a commit survives: process: the death of any process; power: a power loss, too (an fsync a commit)"""

_WAL_BYTES = 16 << 20
"""write-ahead log that may gather before it is moved into the file"""
CACHE_BYTES = 64 << 20
"""pages kept in memory"""
PRUNED_AT_ONCE = 16
"""groups whose payloads are deleted in one portion, so that no message waits for a long deletion"""
ROWS_AT_ONCE = (64, 16, 8, 4, 2, 1)
"""that one statement inserts: each statement gives Python's lock back, and has to wait for it again"""
_COLUMNS = (
    "group_id, sample, split, problem, version_min, version_max, reward, length, policy_length, num_turns, ended, "
    "reason, generator, started_at, finished_at"
)


class Store(SamplerWriter, PoolWriter, StoreReader):
    """The buffer's store. Every write belongs to the open transaction until `commit()`."""

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        create: bool,
        cache_bytes: int = CACHE_BYTES,
        recent_bytes: int = 0,
        max_bytes: int = 0,
    ) -> None:
        """`create`: make a new file; else go on with one that exists. `cache_bytes`: of pages kept in memory.
        `recent_bytes`: of trajectories kept in memory until their batch was read.
        `max_bytes`: size the file may reach, without its write-ahead log; 0: no limit. Raises UserError."""
        self.path = path
        self.max_bytes = max_bytes
        self.seconds_writing = 0.0
        """wall seconds that its owner spent on writes and commits, waiting for the disk and a processor included"""
        self.processor_seconds = 0.0
        """of them, those on a processor"""
        self.commits = 0
        self.pruning = True
        """whether there may be payloads that nothing needs"""
        self._new_groups: list[tuple[Any, ...]] = []
        self._new_trajectories: list[tuple[Trajectory, Blob]] = []
        """added, and inserted before anything else is done"""
        self._recent = Recent(most_bytes=recent_bytes)
        self._beginnings = Beginnings(self._whole_one)
        self._coming: dict[tuple[int, int], Blob] = {}
        """what the next statement inserts, by group and sample"""
        if create and store_begun(path):
            raise UserError(f"{path}: there is a store already; choose another run folder or resume this one")
        if not create and not path.is_file():
            raise UserError(f"{path}: there is no store to go on with; start a new run")
        self._lock = _writer_lock(path)
        try:
            with explained(path, UserError, max_bytes=max_bytes):
                self._connection = connect(path, mode="rw")
                if create:
                    self._make()
                else:
                    self.refuse_foreign()
                    self._connection.execute(f"PRAGMA user_version = {SCHEMA}")  # of an older one, whose rows may stay
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}")
                self._pruned_groups = int(self.meta("pruned_groups", 0))
                """payloads of groups with lower numbers are deleted"""
                self._recent.newest = self.next_numbers()[1] - 1
                self._connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_BYTES // PAGE_BYTES}")
                self._connection.execute(f"PRAGMA cache_size = -{max(1, cache_bytes >> 10)}")
                if max_bytes:  # never below what is there already: then nothing more fits
                    self._connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // PAGE_BYTES)}")
        except BaseException:
            os.close(self._lock)
            raise

    def add_group(
        self,
        *,
        group: int,
        problem: int,
        split: str,
        admitted_version: int,
        admitted_at: float,
        generator: str,
        position: int = -1,
        attempt: int = 0,
    ) -> None:
        """Adding a group again changes only its generator (its permit was issued anew)."""
        if split == "train":
            self._recent.begin(group)
        self._new_groups.append((group, problem, split, position, attempt, admitted_version, admitted_at, generator))

    def add_trajectories(self, trajectories: Sequence[Trajectory], blobs: Sequence[Blob] = ()) -> None:
        """Store them; those that were there before stay as they are.

        `blobs`: the bytes of each, as they arrived; empty when they are not at hand."""
        assert len(blobs) in (0, len(trajectories))
        self._new_trajectories += zip(trajectories, blobs or map(pack, trajectories), strict=True)
        if len(self._new_trajectories) >= ROWS_AT_ONCE[0]:
            self._flush()

    def _flush(self) -> None:
        """Insert what waits for it: many rows a statement."""
        if not self._new_groups and not self._new_trajectories:
            return
        groups, self._new_groups = self._new_groups, []
        new, self._new_trajectories = self._new_trajectories, []
        with self._writing():
            execute = self._begun_already().execute
            for some in _portions(groups):
                execute(_inserting_groups(len(some)), [value for row in some for value in row])
            for some in _portions(new):
                self._insert(some)

    def _insert(self, new: Sequence[tuple[Trajectory, Blob]]) -> None:
        execute = self._connection.execute
        given: list[Any] = []
        for t, _ in new:
            given += (t.group, t.sample, t.split, t.problem, t.version_min, t.version_max, t.reward)
            given += (len(t.tokens), t.num_policy_tokens, len(t.turns))
            given += (t.ended, t.reason, t.generator, t.started_at, t.finished_at)
        inserted = execute(_inserting(len(new)), given)
        # numbered in their order, one after another
        last, fresh = inserted.lastrowid or 0, inserted.rowcount
        places = range(len(new)) if fresh == len(new) else self._fresh([t for t, _ in new], last, fresh)
        payloads: list[Any] = []
        for number, place in enumerate(places, start=last - fresh + 1):
            t, blob = new[place]
            if t.group >= self._pruned_groups:  # else it is so late that its group was dropped
                self._coming[t.group, t.sample] = blob
                payloads += (number, payload := self._beginnings.cut(t, blob))
                self._recent.add(t.group, t.sample, payload)
        self._coming.clear()
        if payloads:
            execute(_inserting_payloads(len(payloads) // 2), payloads)

    def _fresh(self, trajectories: Sequence[Trajectory], last: int, count: int) -> list[int]:
        """Places of those that were not there before: the last `count` rows, up to number `last`."""
        query = "SELECT group_id, sample FROM trajectories WHERE id > ? ORDER BY id"
        rows = self._connection.execute(query, (last - count,)).fetchall() if count else []
        names = [(t.group, t.sample) for t in trajectories]
        return [names.index(name) for name in rows]

    def _whole_one(self, group: int, sample: int) -> Blob | None:
        """The blob of one that is stored, or about to be."""
        if (coming := self._coming.get((group, sample))) is not None:
            return coming
        return self.load_one(group, sample)

    def save_turns(self, trajectories: Iterable[Trajectory]) -> None:
        """Finished turns of running episodes, each in place of what was saved of it before."""
        for t in trajectories:
            self._write("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", (t.group, t.sample, pack(t)))

    def drop_turns(self, pairs: Iterable[tuple[int, int]]) -> None:
        """These episodes, (group, sample), are finished."""
        for pair in pairs:
            self._write("DELETE FROM turns WHERE group_id = ? AND sample = ?", pair)

    def refuse_group(self, group: int, reason: str) -> None:
        """It will not be trained. It and its trajectories stay, with the reason."""
        self._flush()
        self._recent.drop(group)
        self._write("UPDATE groups SET refused_because = ? WHERE group_id = ?", (reason, group))
        self._write("UPDATE trajectories SET refused_because = ? WHERE group_id = ?", (reason, group))

    def add_dropped(self, trajectories: Sequence[Trajectory]) -> None:
        """Store what arrived of groups that were refused before, with their groups' reasons."""
        self.add_trajectories(trajectories)
        reason = "(SELECT refused_because FROM groups WHERE groups.group_id = trajectories.group_id)"
        for group in {t.group for t in trajectories}:
            self._flush()
            self._recent.drop(group)
            self._write(f"UPDATE trajectories SET refused_because = {reason} WHERE group_id = ?", (group,))

    def form_batch(self, *, step: int, groups: Sequence[int], formed_at: float) -> None:
        """These groups, in this order, with the trajectories stored so far, are the batch of `step`.

        Raises StoreError when that batch was formed with other groups, or a group is in another one."""
        formed = self._all("SELECT groups FROM batches WHERE step = ?", (step,))
        if formed:
            if json.loads(formed[0][0]) != list(groups):
                raise StoreError(f"{self.path}: the batch of step {step} was formed before, with other groups")
            return
        these = json.dumps(list(groups))
        among = "group_id IN (SELECT value FROM json_each(?))"
        free = f"{among} AND step IS NULL AND refused_because IS NULL"
        if self._write(f"UPDATE groups SET step = ? WHERE {free}", (step, these)).rowcount != len(groups):
            taken = self._all(f"SELECT group_id FROM groups WHERE {among} AND step = ?", (these, step))
            other = next(group for group in groups if (group,) not in taken)
            raise StoreError(f"{self.path}: group {other} is not free for the batch of step {step}")
        self._write(f"UPDATE trajectories SET step = ? WHERE {among}", (step, these))
        self._recent.form(groups)
        self._write(
            "INSERT INTO batches (step, groups, formed_at) VALUES (?, ?, ?)",
            (step, these, formed_at),
        )

    def mark_trained(self, *, step: int, trained_at: float) -> None:
        """The weights of version `step + 1` exist. Marking twice keeps the first time."""
        first = "UPDATE batches SET trained_at = ? WHERE step = ? AND trained_at IS NULL"
        self._write(first, (trained_at, step))

    def mark_consumed(self, *, step: int, oldest: int = 0) -> None:
        """The weights of version `step + 1` are in a checkpoint. `oldest`: version of the oldest one kept."""
        self.set_meta("consumed_step", max(step, self.consumed_step()))
        self.set_meta("oldest_checkpoint", oldest)

    def prune(self, *, keep_steps: int, oldest_live: int, pool: Collection[tuple[int, int]] = ()) -> bool:
        """Delete one portion of the payloads that nothing needs: of batches older than the newest `keep_steps`
        consumed ones and than the oldest checkpoint kept (a resume may fall back on it), and of refused and
        evaluated groups admitted before the groups of all later batches. Rows stay. `oldest_live`: lowest number
        of a group that is not finished with; `pool`: (group, sample) that may come back, whose payloads are kept. True
        when something was deleted: there may be more."""
        self.pruning = self._prune(keep_steps, oldest_live, pool)
        return self.pruning

    def _prune(self, keep_steps: int, oldest_live: int, pool: Collection[tuple[int, int]]) -> bool:
        first = min(self.consumed_step() + 1 - keep_steps, int(self.meta("oldest_checkpoint", 0)))
        if first <= 0:
            return False
        (lowest,) = self._all("SELECT min(group_id) FROM groups WHERE step >= ?", (first,))[0]
        end = oldest_live if lowest is None else min(lowest, oldest_live)
        query = "SELECT group_id FROM groups WHERE group_id >= ? AND group_id < ? ORDER BY group_id LIMIT ?"
        portion = [group for (group,) in self._all(query, (self._pruned_groups, end, PRUNED_AT_ONCE))]
        if not portion:
            return False
        if self.first_step() < first:  # before anything is deleted: a batch that is there is whole
            self.set_meta("first_step", first)
        self.spare_pool(portion, pool, since=first)
        of_group = "SELECT id FROM trajectories WHERE group_id = ?"
        for group in portion:
            self._write(f"DELETE FROM payloads WHERE id IN ({of_group})", (group,))
            self._write("DELETE FROM turns WHERE group_id = ?", (group,))
        self._pruned_groups = portion[-1] + 1
        self.set_meta("pruned_groups", self._pruned_groups)
        return True

    def rewind(self, *, version: int, now: float) -> None:
        """The run goes on from the weights of `version`: later ones are lost, their batches are kept and are trained
        again. What the checkpoint holds counts as trained, even if the trainer's message about it was lost."""
        unheard = "UPDATE batches SET trained_at = ? WHERE step < ? AND trained_at IS NULL"
        self._write(unheard, (now, version))
        self._write("UPDATE batches SET trained_at = NULL WHERE step >= ?", (version,))
        self.set_meta("consumed_step", version - 1)

    def give_up(self, *, version: int, reason: str) -> None:
        """The run went back: from `version` on, its weights are not those that sampled what is not trained yet. All of
        that is refused, also in batches that were formed ahead. Doing it again changes nothing."""
        if int(self.meta("gone_back_at", 0)) == version:
            return
        for table in ("groups", "trajectories"):
            self._write(f"UPDATE {table} SET step = NULL WHERE step >= ?", (version,))
        self._write("DELETE FROM batches WHERE step >= ?", (version,))
        self.forget_reused(since=version)
        self._write("DELETE FROM turns", ())
        waiting = [row.group for row in self.groups(unfinished=True) if row.split == "train"]
        for group in waiting:
            self.refuse_group(group, reason)
        self.set_meta("gone_back_at", version)

    def add_evaluation(
        self,
        *,
        evaluation: int,
        rewards: Sequence[float],
        version_min: int,
        version_max: int,
        finished_at: float,
    ) -> None:
        judged = [reward for reward in rewards if not isnan(reward)]
        mean = sum(judged) / len(judged) if judged else None
        values = [None if isnan(reward) else reward for reward in rewards]
        self._write(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
            (evaluation, version_min, version_max, mean, json.dumps(values), finished_at),
        )

    def set_meta(self, key: str, value: str | int | float) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def commit(self) -> None:
        """Make everything written so far durable. Nothing to write: nothing is done."""
        self._flush()
        if self._connection.in_transaction:
            with explained(self.path, max_bytes=self.max_bytes):
                self._connection.execute("COMMIT")
            self.commits += 1

    def load_part(self, step: int, *, after: int, most_bytes: int) -> tuple[int, list[Blob]] | None:
        found = super().load_part(step, after=after, most_bytes=most_bytes)
        if found is not None and after + len(found[1]) == found[0]:
            for (groups,) in self._all("SELECT groups FROM batches WHERE step = ?", (step,)):
                for group in json.loads(groups):
                    self._recent.drop(group)
        return found

    def _stored(self, step: int, group: int) -> list[tuple[int, Blob]]:
        recent = self._recent.payloads(group)
        return super()._stored(step, group) if recent is None else recent

    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        self._flush()
        return super()._all(query, given)

    def _rows(self, row: type[Row], query: str, given: Sequence[Any] = ()) -> Iterator[Row]:
        self._flush()
        return super()._rows(row, query, given)

    def close(self) -> None:
        """What was not committed is lost."""
        self._connection.close()
        os.close(self._lock)

    def _write(self, statement: str, values: Sequence[Any]) -> sqlite3.Cursor:
        with self._writing():
            return self._begun().execute(statement, values)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A statement that fails takes its transaction with it: half a round is never committed."""
        try:
            with explained(self.path, max_bytes=self.max_bytes):
                yield
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _begun(self) -> sqlite3.Connection:
        """The connection with a transaction open, and all that was added before."""
        self._flush()
        return self._begun_already()

    def _begun_already(self) -> sqlite3.Connection:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def _make(self) -> None:
        self._connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(
            f"BEGIN; {TABLES} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA};"
            f"INSERT INTO meta VALUES ('schema', {SCHEMA}), ('consumed_step', -1); COMMIT;"
        )


Row = TypeVar("Row")


def _portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """A few lengths, so that few statements are prepared."""
    first = 0
    while first < len(rows):
        length = next(n for n in ROWS_AT_ONCE if n <= len(rows) - first)
        yield rows[first : first + length]
        first += length


@cache
def _inserting_groups(rows: int) -> str:
    return (
        "INSERT INTO groups (group_id, problem, split, position, attempt, admitted_version, admitted_at, "
        f"generator) VALUES {_places(8, rows)} ON CONFLICT DO UPDATE SET generator = excluded.generator"
    )


@cache
def _inserting(rows: int) -> str:
    return f"INSERT INTO trajectories ({_COLUMNS}) VALUES {_places(15, rows)} ON CONFLICT DO NOTHING"


@cache
def _inserting_payloads(rows: int) -> str:
    return f"INSERT INTO payloads VALUES {_places(2, rows)}"


def _places(columns: int, rows: int) -> str:
    """Example: `(?, ?), (?, ?), (?, ?)`."""
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


def store_begun(path: Path) -> bool:
    """Whether the file holds anything; a process killed while it made the store leaves an empty file."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    try:
        connection = connect(path, mode="ro")
        try:
            return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.Error:
        return True  # something else, which must not be written over


def _writer_lock(path: Path) -> int:
    """A lock that the system releases when this process ends, however it ends. The file descriptor must outlive the
    connection: closing it earlier would drop SQLite's own locks."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose a run folder this user may write to"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{path}: another process is writing this store; end that run or choose another run folder"
        ) from None
    return descriptor
