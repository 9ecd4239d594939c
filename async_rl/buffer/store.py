"""The durable record of a run: one SQLite file that any SQL tool can open, also while the run goes on.

Writes are gathered in one transaction and made durable by `commit()`; whoever is told that something is
stored is told after it. One process writes (kept by a lock on the file); readers never block it.
Payloads are blobs of trajectory/codec.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from async_rl.errors import UserError
from async_rl.trajectory.codec import pack
from async_rl.trajectory.types import Trajectory

Durability = Literal["process", "power"]
"""what a commit survives: the death of any process; also a power loss (an fsync a commit)"""

SCHEMA = 1
_APPLICATION_ID = 0x41524C31
_PAGE_BYTES = 32768
"""large pages: a blob of 10-20 kB fits one, and writing is 2-3 times faster than with 4 kB"""
_WAL_BYTES = 64 << 20
"""write-ahead log that may gather before it is moved into the file"""
_LOCK_WAIT_S = 10.0

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY, problem INTEGER, split TEXT,
    admitted_version INTEGER, admitted_at REAL, generator TEXT,
    step INTEGER,             -- the batch it is in
    refused_because TEXT      -- why it will not be trained
);
CREATE INDEX groups_by_step ON groups (step) WHERE step IS NOT NULL;
CREATE TABLE trajectories (
    group_id INTEGER, sample INTEGER, split TEXT, problem INTEGER,
    step INTEGER, version_min INTEGER, version_max INTEGER, reward REAL,
    length INTEGER, policy_length INTEGER, num_turns INTEGER,
    ended TEXT, reason TEXT, refused_because TEXT, generator TEXT,
    started_at REAL, finished_at REAL,
    payload BLOB              -- the trajectory itself, see async_rl/trajectory/codec.py
);
CREATE UNIQUE INDEX trajectories_by_sample ON trajectories (group_id, sample);
CREATE TABLE batches (
    step INTEGER PRIMARY KEY,
    groups TEXT,              -- JSON list of group ids, in the batch's order
    formed_at REAL, trained_at REAL
);
CREATE TABLE evaluations (
    evaluation INTEGER PRIMARY KEY, version_min INTEGER, version_max INTEGER,
    reward REAL, rewards TEXT, -- mean; JSON list
    finished_at REAL
);
"""
_GROUP = "group_id, problem, split, admitted_version, admitted_at, generator, step, refused_because"
_TRAJECTORY = (
    "group_id, sample, split, problem, step, version_min, version_max, reward, length, policy_length, "
    "num_turns, ended, reason, refused_because, generator, started_at, finished_at"
)
Row = TypeVar("Row")


class StoreError(Exception):
    """The store cannot go on (disk full, file lost, ...). The message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    group: int
    problem: int
    split: str
    admitted_version: int
    admitted_at: float
    """seconds, the buffer's clock"""
    generator: str
    step: int | None = None
    """batch it is in"""
    refused_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRow:
    """A trajectory without its tokens."""

    group: int
    sample: int
    split: str
    problem: int
    step: int | None
    version_min: int
    version_max: int
    reward: float | None
    """None where it was NaN"""
    length: int
    """tokens"""
    policy_length: int
    """tokens sampled by the policy"""
    num_turns: int
    ended: str
    reason: str
    refused_because: str | None
    generator: str
    started_at: float
    finished_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    step: int
    groups: tuple[int, ...]
    formed_at: float
    trained_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    evaluation: int
    version_min: int
    version_max: int
    reward: float
    """mean"""
    rewards: tuple[float, ...]
    finished_at: float


class StoreReader:
    """Reads a store, also one that another process is writing. It sees what was committed."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is missing or no store."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no store here; name a run folder that has trajectories.sqlite")
        with _explained(path, UserError):
            self._connection = _connect(path, mode="ro")
            self._refuse_foreign()

    def trajectories(self, *, step: int | None = None, split: str | None = None) -> Iterator[TrajectoryRow]:
        """In the order of arrival, without tokens."""
        where = " AND ".join(
            [f"{name} = ?" for name, value in (("step", step), ("split", split)) if value is not None]
            or ["1"]
        )
        given = [value for value in (step, split) if value is not None]
        query = f"SELECT {_TRAJECTORY} FROM trajectories WHERE {where} ORDER BY rowid"
        return self._rows(TrajectoryRow, query, given)

    def groups(self, *, unfinished: bool = False) -> Iterator[GroupRow]:
        """In the order of admission; `unfinished`: only those neither in a batch nor refused."""
        where = "step IS NULL AND refused_because IS NULL" if unfinished else "1"
        return self._rows(GroupRow, f"SELECT {_GROUP} FROM groups WHERE {where} ORDER BY group_id")

    def batches(self) -> Iterator[BatchRow]:
        for step, groups, formed_at, trained_at in self._all("SELECT * FROM batches ORDER BY step"):
            yield BatchRow(
                step=step, groups=tuple(json.loads(groups)), formed_at=formed_at, trained_at=trained_at
            )

    def evaluations(self) -> Iterator[EvaluationRow]:
        for number, low, high, reward, rewards, at in self._all(
            "SELECT * FROM evaluations ORDER BY evaluation"
        ):
            yield EvaluationRow(
                evaluation=number,
                version_min=low,
                version_max=high,
                reward=reward,
                rewards=tuple(json.loads(rewards)),
                finished_at=at,
            )

    def load_groups(self, groups: Sequence[int]) -> list[bytes]:
        """Blobs of these groups: group by group in the given order, sample by sample."""
        found: list[bytes] = []
        query = "SELECT payload FROM trajectories WHERE group_id = ? ORDER BY sample"
        for group in groups:
            found += [payload for (payload,) in self._all(query, (group,))]
        return found

    def load_batch(self, step: int) -> list[bytes] | None:
        """Blobs of the batch of `step`: the same ones in the same order whenever asked. None: not formed."""
        batch = self._all("SELECT groups FROM batches WHERE step = ?", (step,))
        if not batch:
            return None
        found: list[bytes] = []
        query = "SELECT payload FROM trajectories WHERE group_id = ? AND step = ? ORDER BY sample"
        for group in json.loads(batch[0][0]):
            found += [payload for (payload,) in self._all(query, (group, step))]
        return found

    def counts(self) -> dict[str, int]:
        """How many groups are admitted, in a batch, refused; trajectories, batches, batches trained."""
        groups = "count(*), count(step), count(refused_because)"
        admitted, batched, refused = self._all(f"SELECT {groups} FROM groups WHERE split = 'train'")[0]
        batches, trained = self._all("SELECT count(*), count(trained_at) FROM batches")[0]
        return {
            "groups_admitted": admitted,
            "groups_batched": batched,
            "groups_refused": refused,
            "trajectories": self._all("SELECT count(*) FROM trajectories")[0][0],
            "batches": batches,
            "batches_trained": trained,
        }

    def consumed_step(self) -> int:
        """The last step whose batch was trained; -1 before the first."""
        return int(self.meta("consumed_step", -1))

    def meta(self, key: str, default: Any = None) -> Any:
        found = self._all("SELECT value FROM meta WHERE key = ?", (key,))
        return found[0][0] if found else default

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _rows(self, row: type[Row], query: str, given: Sequence[Any] = ()) -> Iterator[Row]:
        names = list(row.__dataclass_fields__)  # type: ignore[attr-defined]
        with _explained(self.path):
            for values in self._connection.execute(query, given):
                yield row(**dict(zip(names, values, strict=True)))

    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        with _explained(self.path):
            return self._connection.execute(query, given).fetchall()

    def _refuse_foreign(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (schema,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise UserError(f"{self.path}: this is an SQLite file, but not a store of async_rl")
        if schema != SCHEMA:
            raise UserError(
                f"{self.path}: this store has schema {schema}, this program reads {SCHEMA}; "
                "use the version of async_rl that wrote it"
            )


class Store(StoreReader):
    """The buffer's store. Every write belongs to the open transaction until `commit()`."""

    def __init__(self, path: Path, *, durability: Durability, create: bool) -> None:
        """`create`: make a new file; else go on with one that exists. Raises UserError."""
        self.path = path
        if create and path.exists():
            raise UserError(f"{path}: there is a store already; choose another run folder or resume this one")
        if not create and not path.is_file():
            raise UserError(f"{path}: there is no store to go on with; start a new run")
        self._lock = _writer_lock(path)
        try:
            with _explained(path, UserError):
                self._connection = _connect(path, mode="rw")
                if create:
                    self._make()
                else:
                    self._refuse_foreign()
                self._connection.execute(
                    f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}"
                )
                self._connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_BYTES // _PAGE_BYTES}")
                self._connection.execute("PRAGMA cache_size = -65536")
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
    ) -> None:
        """Adding a group again changes only its generator (its permit was issued anew)."""
        self._write(
            "INSERT INTO groups (group_id, problem, split, admitted_version, admitted_at, generator) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET generator = excluded.generator",
            (group, problem, split, admitted_version, admitted_at, generator),
        )

    def add_trajectories(self, trajectories: Iterable[Trajectory]) -> list[tuple[int, int]]:
        """Store them; the (group, sample) of those that were there before, which stay as they are."""
        return [(t.group, t.sample) for t in trajectories if not self._add(t)]

    def _add(self, t: Trajectory) -> bool:
        values = (t.group, t.sample, t.split, t.problem, t.version_min, t.version_max, t.reward)
        values += (len(t.tokens), t.num_policy_tokens, len(t.turns), t.ended, t.reason, t.generator)  # type: ignore[assignment]
        return self._write(_INSERT, (*values, t.started_at, t.finished_at, pack(t))) == 1

    def refuse_group(self, group: int, reason: str) -> None:
        """It will not be trained. It and its trajectories stay, with the reason."""
        self._write("UPDATE groups SET refused_because = ? WHERE group_id = ?", (reason, group))
        self._write("UPDATE trajectories SET refused_because = ? WHERE group_id = ?", (reason, group))

    def form_batch(self, *, step: int, groups: Sequence[int], formed_at: float) -> None:
        """These groups, in this order, with the trajectories stored so far, are the batch of `step`.

        Raises StoreError when that batch was formed with other groups, or a group is in another one."""
        formed = self._all("SELECT groups FROM batches WHERE step = ?", (step,))
        if formed:
            if json.loads(formed[0][0]) != list(groups):
                raise StoreError(
                    f"{self.path}: the batch of step {step} was formed before, with other groups"
                )
            return
        for group in groups:
            free = "group_id = ? AND step IS NULL AND refused_because IS NULL"
            if self._write(f"UPDATE groups SET step = ? WHERE {free}", (step, group)) != 1:
                raise StoreError(f"{self.path}: group {group} is not free for the batch of step {step}")
            self._write("UPDATE trajectories SET step = ? WHERE group_id = ?", (step, group))
        self._write(
            "INSERT INTO batches (step, groups, formed_at) VALUES (?, ?, ?)",
            (step, json.dumps(list(groups)), formed_at),
        )

    def mark_trained(self, *, step: int, trained_at: float) -> None:
        """The weights of version `step + 1` exist. Marking twice keeps the first time."""
        first = "UPDATE batches SET trained_at = ? WHERE step = ? AND trained_at IS NULL"
        self._write(first, (trained_at, step))
        self.set_meta("consumed_step", max(step, self.consumed_step()))

    def add_evaluation(
        self,
        *,
        evaluation: int,
        rewards: Sequence[float],
        version_min: int,
        version_max: int,
        finished_at: float,
    ) -> None:
        mean = sum(rewards) / len(rewards) if rewards else None
        self._write(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
            (evaluation, version_min, version_max, mean, json.dumps(list(rewards)), finished_at),
        )

    def set_meta(self, key: str, value: str | int | float) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def commit(self) -> None:
        """Make everything written so far durable. Nothing to write: nothing is done."""
        if self._connection.in_transaction:
            with _explained(self.path):
                self._connection.execute("COMMIT")

    def close(self) -> None:
        """What was not committed is lost."""
        self._connection.close()
        os.close(self._lock)

    def _write(self, statement: str, values: Sequence[Any]) -> int:
        """Rows changed."""
        with _explained(self.path):
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            return self._connection.execute(statement, values).rowcount

    def _make(self) -> None:
        self._connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(
            f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {SCHEMA};"
            f"INSERT INTO meta VALUES ('schema', {SCHEMA}), ('consumed_step', -1); COMMIT;"
        )


_INSERT = (
    "INSERT INTO trajectories (group_id, sample, split, problem, version_min, version_max, reward, length, "
    "policy_length, num_turns, ended, reason, generator, started_at, finished_at, payload) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
)


def _connect(path: Path, *, mode: str) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_LOCK_WAIT_S, isolation_level=None)


def _writer_lock(path: Path) -> int:
    """A lock that the system gives back when this process ends, however it ends. The file descriptor
    must outlive the connection: closing it earlier would drop SQLite's own locks."""
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


@contextmanager
def _explained(path: Path, kind: type[Exception] = StoreError) -> Iterator[None]:
    """SQLite's errors as ours, with the file and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        remedies = {
            "disk is full": "free some space on this disk and resume the run",
            "readonly": "make the file and its folder writable, then resume the run",
            "locked": f"another program held it for {_LOCK_WAIT_S:g} s; close that one and resume the run",
            "not a database": "this is no SQLite file; name the trajectories.sqlite of a run",
            "malformed": "the file is damaged; restore it from a copy (sqlite3's .recover may help)",
        }
        remedy = next((remedies[key] for key in remedies if key in said), "is its disk in order?")
        raise kind(f"{path}: {said}; {remedy}") from error
