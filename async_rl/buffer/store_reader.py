"""Reading the record of a run, also while it goes on: its tables, rows, and `StoreReader`; `StoreSurvey` answers
questions about a whole run's trajectories.

A reader sees what was committed and never blocks the writer. A half-read iterator holds a snapshot, which keeps the
write-ahead log from shrinking: read iterators to the end.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from async_rl.buffer.pool_store import PoolReader
from async_rl.buffer.sampler_rows import SamplerReader
from async_rl.errors import RunFailed, UserError
from async_rl.trajectory.beginnings import HEAD_BYTES, Joining, is_cut, name_of, refers_to, whole_bytes
from async_rl.trajectory.codec import Blob, WireError
from async_rl.wire.messages import ABANDONED

SCHEMA = 3
"""2: without cut payloads (trajectory/beginnings.py), up to 0.4.0"""
READ_SCHEMAS = (2, SCHEMA)
APPLICATION_ID = 0x41524C31
PAGE_BYTES = 16384
"""a commit writes whole pages: larger pages cost short trajectories more (0.5 ms instead of 0.2 a commit at 32 kB),
smaller pages spread long trajectories over many"""
LOCK_WAIT_S = 10.0

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY, problem INTEGER, split TEXT,
    position INTEGER,         -- in the prompt order; -1: evaluation
    attempt INTEGER,          -- how often a group of this position was dropped before
    admitted_version INTEGER, admitted_at REAL, generator TEXT,
    step INTEGER,             -- the batch it is in
    refused_because TEXT      -- why it will not be trained
);
CREATE INDEX groups_by_step ON groups (step) WHERE step IS NOT NULL;
CREATE TABLE trajectories (
    id INTEGER PRIMARY KEY,   -- order of arrival
    group_id INTEGER, sample INTEGER, split TEXT, problem INTEGER,
    step INTEGER, version_min INTEGER, version_max INTEGER, reward REAL,
    length INTEGER, policy_length INTEGER, num_turns INTEGER,
    ended TEXT, reason TEXT, refused_because TEXT, generator TEXT,
    started_at REAL, finished_at REAL
);
CREATE UNIQUE INDEX trajectories_by_sample ON trajectories (group_id, sample);
-- Apart from the columns, so that setting a step or scanning the columns does not move the bytes.
CREATE TABLE payloads (
    id INTEGER PRIMARY KEY,   -- that of the trajectory
    payload BLOB              -- see async_rl/trajectory/codec.py
);
-- Finished turns of episodes that still run; long episodes only.
CREATE TABLE turns (
    group_id INTEGER, sample INTEGER, payload BLOB,
    PRIMARY KEY (group_id, sample)
);
CREATE TABLE batches (
    step INTEGER PRIMARY KEY,
    groups TEXT,              -- JSON list of group ids, in the batch's order
    formed_at REAL, trained_at REAL
);
CREATE TABLE evaluations (
    evaluation INTEGER PRIMARY KEY, version_min INTEGER, version_max INTEGER,
    reward REAL, rewards TEXT, -- mean; JSON list, null for an episode that failed
    finished_at REAL
);
"""
_GROUP = "group_id, problem, split, position, attempt, admitted_version, admitted_at, generator, step, refused_because"
_TRAJECTORY = (
    "group_id, sample, split, problem, step, version_min, version_max, reward, length, policy_length, "
    "num_turns, ended, reason, refused_because, generator, started_at, finished_at"
)
_NAMES = "SELECT group_id, sample FROM trajectories JOIN payloads USING (id)"
_PAYLOADS = "SELECT payload FROM trajectories JOIN payloads USING (id)"
MOST_SCANNED = 200_000
"""trajectories read for one survey (about half a second); of a larger store, evenly spread stretches are read"""
_STRETCHES = 64
_SURVEYED = (
    "t.group_id, t.sample, t.split, t.step, t.version_min, t.version_max, t.reward, t.policy_length, t.num_turns, "
    "t.ended, t.refused_because, coalesce(g.generator, ''), t.started_at, t.finished_at"
)
_WITH_GENERATOR = "FROM trajectories t LEFT JOIN groups g ON g.group_id = t.group_id"
Row = TypeVar("Row")


class StoreError(RunFailed):
    """The store cannot go on (disk full, file lost, ...). The message names the file and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """A group as it was admitted, and what became of it."""

    group: int
    problem: int
    split: str
    position: int
    """in the prompt order; -1: evaluation"""
    attempt: int
    """how often a group of this position was dropped before"""
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
    """batch it is in"""
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
    """The batch of a training step."""

    step: int
    groups: tuple[int, ...]
    """in the batch's order"""
    formed_at: float
    """seconds, the buffer's clock"""
    trained_at: float | None
    """None: weights of version step + 1 do not exist"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """The result of an evaluation."""

    evaluation: int
    version_min: int
    """oldest weights that sampled a token of it"""
    version_max: int
    reward: float
    """mean"""
    rewards: tuple[float, ...]
    finished_at: float


class StoreReader(SamplerReader, PoolReader):
    """Reads a store, also one that another process is writing. It sees what was committed."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file is missing or no store."""
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no store here; name a run folder that has trajectories.sqlite")
        with explained(path, UserError):
            self._connection = connect(path, mode="ro")
            self.refuse_foreign()

    def trajectories(self, *, step: int | None = None, split: str | None = None) -> Iterator[TrajectoryRow]:
        """Trajectories in the order of arrival, without tokens; of one step or split, if it is given."""
        where = " AND ".join(
            [f"{name} = ?" for name, value in (("step", step), ("split", split)) if value is not None] or ["1"]
        )
        given = [value for value in (step, split) if value is not None]
        query = f"SELECT {_TRAJECTORY} FROM trajectories WHERE {where} ORDER BY id"
        return self._rows(TrajectoryRow, query, given)

    def rows_in_batches(self) -> Iterator[TrajectoryRow]:
        """Trajectories that are in a batch, in the order of arrival, without tokens."""
        query = f"SELECT {_TRAJECTORY} FROM trajectories WHERE step IS NOT NULL ORDER BY id"
        return self._rows(TrajectoryRow, query)

    def groups(self, *, unfinished: bool = False, since: int = 0) -> Iterator[GroupRow]:
        """In the order of admission, from group `since` on. `unfinished`: only those neither in a batch nor refused."""
        where = "step IS NULL AND refused_because IS NULL" if unfinished else "1"
        query = f"SELECT {_GROUP} FROM groups WHERE {where} AND group_id >= ? ORDER BY group_id"
        return self._rows(GroupRow, query, (since,))

    def trajectories_of(self, group: int) -> Iterator[TrajectoryRow]:
        """Trajectories of a group, sample by sample, without tokens."""
        query = f"SELECT {_TRAJECTORY} FROM trajectories WHERE group_id = ? ORDER BY sample"
        return self._rows(TrajectoryRow, query, (group,))

    def next_numbers(self) -> tuple[int, int]:
        """(step of the next batch, number of the next group)."""
        (step,) = self._all("SELECT coalesce(max(step) + 1, 0) FROM batches")[0]
        (group,) = self._all("SELECT coalesce(max(group_id) + 1, 0) FROM groups")[0]
        return step, group

    def next_position(self) -> int:
        """The next position in the prompt order: behind every one that was asked."""
        (position,) = self._all("SELECT coalesce(max(position) + 1, 0) FROM groups")[0]
        return int(position)

    def dropped_last(self) -> list[tuple[int, int, str]]:
        """(position, attempt, why) of the groups refused as stale, because the run went back ("rollback") or because
        their generator lied ("fabricated"), whose problem was not asked again since."""
        newest = (
            "SELECT position, attempt, refused_because, max(group_id) FROM groups WHERE split = 'train' "
            "GROUP BY position"
        )
        why = "substr(refused_because, 1, instr(refused_because, ':') - 1)"
        found = (
            f"SELECT position, attempt, {why} AS why FROM ({newest}) WHERE why IN ('stale', 'rollback', 'fabricated') "
            "ORDER BY position"
        )
        return [tuple(row) for row in self._all(found)]

    def lengths(self, ends: Sequence[int]) -> list[tuple[str, int, int, int]]:
        """(trained, dropped or refused; bucket; trajectories; policy tokens) of training trajectories that are in a
        batch, were dropped as stale or refused otherwise, by the buckets of policy tokens that end below `ends`.
        Without failed ones, except those that a generator gave up when it was told, and those without a policy
        token."""
        bucket = " + ".join(f"(policy_length >= {end})" for end in ends)
        kind = (
            "CASE WHEN step IS NOT NULL THEN 'trained' WHEN refused_because LIKE 'stale:%' THEN 'dropped' "
            "WHEN refused_because IS NOT NULL THEN 'refused' END"
        )
        query = (
            f"SELECT {kind} AS kind, {bucket} AS bucket, count(*), sum(policy_length) FROM trajectories "
            "WHERE split = 'train' AND policy_length > 0 AND kind IS NOT NULL "
            "AND (ended NOT IN ('error', 'aborted') OR (kind = 'dropped' AND reason = ?)) GROUP BY 1, 2"
        )
        return [tuple(row) for row in self._all(query, (ABANDONED,))]

    def tally(self) -> dict[str, int]:
        """Training groups refused by reason (`refused_<reason>`), trajectories by split, how many failed, and
        policy tokens of all (`tokens_generated`)."""
        refused = "split = 'train' AND refused_because IS NOT NULL"
        reasons = f"SELECT refused_because, count(*) FROM groups WHERE {refused} GROUP BY 1"
        splits = (
            "SELECT split, count(*), sum(ended IN ('error', 'aborted') AND reason != ?), sum(policy_length) "
            "FROM trajectories GROUP BY split"
        )
        found = Counter({f"refused_{reason}": count for reason, count in self._all(reasons)})
        for split, count, failed, tokens in self._all(splits, (ABANDONED,)):
            found[f"trajectories_{split}"] = count
            found["tokens_generated"] += tokens
            found["trajectories_failed"] += failed
        return dict(found)

    def failures(self) -> list[tuple[str, int]]:
        """(reason, episodes) of those that failed, in the order in which the first of each reason arrived; without
        those that a generator gave up when it was told."""
        query = (
            "SELECT reason, count(*) FROM trajectories WHERE ended IN ('error', 'aborted') AND reason != ? "
            "GROUP BY reason ORDER BY min(id)"
        )
        return [tuple(row) for row in self._all(query, (ABANDONED,))]

    def trained_of(self, generator: str, *, begun_before: float) -> list[tuple[int, int]]:
        """(group, step) of the batches' groups that hold trajectories which this generator sent and had begun before
        that time (seconds since the epoch)."""
        query = (
            "SELECT DISTINCT group_id, step FROM trajectories WHERE generator = ? AND step IS NOT NULL "
            "AND started_at < ? ORDER BY step, group_id"
        )
        return [(group, step) for group, step in self._all(query, (generator, begun_before))]

    def batches(self) -> Iterator[BatchRow]:
        for step, groups, formed_at, trained_at in self._all("SELECT * FROM batches ORDER BY step"):
            yield BatchRow(step=step, groups=tuple(json.loads(groups)), formed_at=formed_at, trained_at=trained_at)

    def evaluations(self) -> Iterator[EvaluationRow]:
        for number, low, high, reward, rewards, at in self._all("SELECT * FROM evaluations ORDER BY evaluation"):
            yield EvaluationRow(
                evaluation=number,
                version_min=low,
                version_max=high,
                reward=reward,
                rewards=tuple(nan if value is None else value for value in json.loads(rewards)),
                finished_at=at,
            )

    def load_groups(self, groups: Sequence[int]) -> list[bytes]:
        """Blobs of these groups: group by group in the given order, sample by sample."""
        query = f"{_PAYLOADS} WHERE group_id = ? ORDER BY sample"
        return [blob for group in groups for blob in self._whole([p for (p,) in self._all(query, (group,))])]

    def load_one(self, group: int, sample: int) -> bytes | None:
        """Blob of one trajectory; None: it is not there, or no longer."""
        found = self._all(f"{_PAYLOADS} WHERE group_id = ? AND sample = ?", (group, sample))
        return self._whole([payload for (payload,) in found])[0] if found else None

    def load_batch(self, step: int) -> list[bytes] | None:
        """Blobs of the batch of `step`: the same ones in the same order whenever asked. None: not formed."""
        batch = self._all("SELECT groups FROM batches WHERE step = ?", (step,))
        if not batch:
            return None
        of_groups = [[payload for _, payload in self._stored(step, group)] for group in json.loads(batch[0][0])]
        return self.with_pool(step, [blob for of_group in of_groups for blob in self._whole(of_group)])

    def load_part(self, step: int, *, after: int, most_bytes: int) -> tuple[int, list[Blob]] | None:
        """(trajectories of the whole batch, blobs of those behind the first `after`): as many as `most_bytes`
        hold when they are whole, one at least. So a batch is read piece by piece, whatever its size. They are cut as in
        the store, and refer to nothing that is not among them (`beginnings.join_all`). None: not formed."""
        batch = self._all("SELECT groups FROM batches WHERE step = ?", (step,))
        if not batch:
            return None
        groups = json.loads(batch[0][0])
        if drawn := self.drawn(step):
            query = f"{_NAMES} WHERE group_id = ? AND step = ? ORDER BY sample"
            names = [name for group in groups for name in self._all(query, (group, step))]
            return self.part_with_pool(drawn, names, after=after, most_bytes=most_bytes)
        sizes = self._sizes(step, batch[0][0])
        found: list[Blob] = []
        there: set[tuple[int, int]] = set()
        place = taken = 0
        for group in groups:
            if place + sizes[group] <= after:
                place += sizes[group]
                continue
            for sample, payload in self._stored(step, group)[max(0, after - place) :]:
                size = whole_bytes(payload[:HEAD_BYTES], len(payload))
                if there and taken + size > most_bytes:
                    return sizes.total(), self._complete(found, there)
                found.append(payload)
                there.add((group, sample))
                taken += size
            place += sizes[group]
        return sizes.total(), self._complete(found, there)

    def _sizes(self, step: int, groups: str) -> Counter[int]:
        """group -> trajectories of it in the batch of `step`. `groups`: JSON list."""
        among = "WHERE group_id IN (SELECT value FROM json_each(?)) AND step = ? GROUP BY group_id"
        counted = f"SELECT group_id, count(*) AS n FROM trajectories JOIN payloads USING (id) {among}"
        ((found,),) = self._all(f"SELECT json_group_array(json_array(group_id, n)) FROM ({counted})", (groups, step))
        return Counter(dict(json.loads(found)))

    def _complete(self, found: list[Blob], there: Container[tuple[int, int]]) -> list[Blob]:
        """The payloads, whole where they refer to none of `there`."""
        return [self._whole([p])[0] if is_cut(p) and not _among(p, there) else p for p in found]

    def _stored(self, step: int, group: int) -> list[tuple[int, Blob]]:
        """(sample, payload) of a group of the batch of `step`, as they are in the store."""
        query = "SELECT sample, payload FROM trajectories JOIN payloads USING (id) WHERE group_id = ? AND step = ?"
        return [(sample, payload) for sample, payload in self._all(f"{query} ORDER BY sample", (group, step))]

    def _whole(self, payloads: Sequence[Blob]) -> list[bytes]:
        """The whole blobs of payloads of one group. One that refers to what is damaged or gone stays as it is: who
        unpacks it is told."""
        if not any(map(is_cut, payloads)):
            return [bytes(payload) for payload in payloads]
        joining = Joining({})
        waiting = list(payloads)
        whole: list[bytes] = []
        for payload in payloads:
            with suppress(WireError):
                joining.there[name_of(payload)] = payload
        while waiting:  # what they refer to is nearly always among them
            with suppress(WireError):
                if is_cut(payload := waiting.pop()) and (name := refers_to(payload)) not in joining.there:
                    for (other,) in self._all(f"{_PAYLOADS} WHERE group_id = ? AND sample = ?", name):
                        joining.there[name] = other
                        waiting.append(other)
        for payload in payloads:
            try:
                whole.append(bytes(joining.whole(payload)))
            except WireError:
                whole.append(bytes(payload))
        return whole

    def load_turns(self, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        """Blobs of the finished turns of these running episodes, (group, sample)."""
        query = "SELECT payload FROM turns WHERE group_id = ? AND sample = ?"
        return [payload for pair in pairs for (payload,) in self._all(query, pair)]

    def begun(self) -> list[tuple[int, int]]:
        """(group, sample) of running episodes of which finished turns are kept."""
        return [(group, sample) for group, sample in self._all("SELECT group_id, sample FROM turns ORDER BY 1, 2")]

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
        """The last step whose weights are in a checkpoint; -1 before the first."""
        return int(self.meta("consumed_step", -1))

    def first_step(self) -> int:
        """The oldest step whose batch is still whole (buffer.keep_steps); 0: nothing was deleted."""
        return int(self.meta("first_step", 0))

    def meta(self, key: str, default: Any = None) -> Any:
        """The small value that was stored under this key."""
        found = self._all("SELECT value FROM meta WHERE key = ?", (key,))
        return found[0][0] if found else default

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _rows(self, row: type[Row], query: str, given: Sequence[Any] = ()) -> Iterator[Row]:
        names = list(row.__dataclass_fields__)  # type: ignore[attr-defined]
        with explained(self.path):
            for values in self._connection.execute(query, given):
                yield row(**dict(zip(names, values, strict=True)))

    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        with explained(self.path):
            return self._connection.execute(query, given).fetchall()

    def refuse_foreign(self) -> None:
        """Raises UserError when the file is not a store, or one of another schema."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (schema,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise UserError(f"{self.path}: this is an SQLite file, but not a store of async_rl")
        if schema not in READ_SCHEMAS:
            raise UserError(
                f"{self.path}: this store has schema {schema}, this program reads {SCHEMA}; "
                "use the version of async_rl that wrote it"
            )


def _among(payload: Blob, there: Container[tuple[int, int]]) -> bool:
    """Whether a cut payload refers to one of these; also for a damaged one, which nothing makes whole."""
    try:
        return refers_to(payload) in there
    except WireError:
        return True


def connect(path: Path, *, mode: str) -> sqlite3.Connection:
    """A connection to the file, for one thread at a time. `mode`: ro or rw."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)


@contextmanager
def explained(path: Path, kind: type[Exception] = StoreError, *, max_bytes: int = 0) -> Iterator[None]:
    """Turns SQLite's errors into `kind`, with the file and the remedy. `max_bytes`: limit set on the file; 0: none."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        room = f"it may hold {max_bytes >> 20} MB (buffer.max_store_mb): raise that, or " if max_bytes else ""
        remedies = {
            "unable to open": "this user must be able to write in its folder; else read a copy elsewhere",
            "disk is full": f"{room}free some space on this disk and resume the run",
            "I/O error": "is the disk full, or a limit on file sizes reached (ulimit -f)? Then resume the run",
            "readonly": "make the file and its folder writable, then resume the run",
            "locked": f"another program held it for {LOCK_WAIT_S:g} s; close that one and resume the run",
            "not a database": "this is no SQLite file; name the trajectories.sqlite of a run",
            "malformed": "the file is damaged; restore it from a copy (sqlite3's .recover may help)",
        }
        remedy = next((remedies[key] for key in remedies if key in said), "is its disk in order?")
        if "disk is full" in said:
            kind = StoreError  # nothing is wrong with what the user asked for, and the run goes on
        raise kind(f"{path}: {said}; {remedy}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """A trajectory without its tokens."""

    group: int
    sample: int
    split: str
    step: int | None
    """batch it is in"""
    version_min: int
    version_max: int
    reward: float | None
    """None where it was NaN"""
    policy_length: int
    """tokens sampled by the policy"""
    num_turns: int
    ended: str
    refused_because: str | None
    generator: str
    """the one that its group's permit was last given to"""
    started_at: float
    """seconds since the epoch"""
    finished_at: float


class StoreSurvey(StoreReader):
    """Reads a store for what its trajectories are like as a whole, from as many of them as can be read at once."""

    def spread(self, most: int = MOST_SCANNED) -> list[Surveyed]:
        """All trajectories, or evenly spread stretches of at most about `most` of them, in order of arrival."""
        last = self.last_id()
        if last <= most:
            return list(self.between(1, last))
        length = most // _STRETCHES
        starts = [1 + (last - length) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
        return [row for start in starts for row in self.between(start, start + length - 1)]

    def newest(self, most: int) -> list[Surveyed]:
        """The last `most` trajectories to arrive."""
        last = self.last_id()
        return list(self.between(last - most + 1, last))

    def between(self, first: int, last: int) -> Iterator[Surveyed]:
        """Trajectories by number of arrival, both ends included."""
        query = f"SELECT {_SURVEYED} {_WITH_GENERATOR} WHERE t.id BETWEEN ? AND ? ORDER BY t.id"
        return self._rows(Surveyed, query, (first, last))

    def of_group(self, group: int) -> Iterator[Surveyed]:
        """Sample by sample."""
        return self._rows(
            Surveyed, f"SELECT {_SURVEYED} {_WITH_GENERATOR} WHERE t.group_id = ? ORDER BY t.sample", (group,)
        )

    def last_id(self) -> int:
        return int(self._all("SELECT coalesce(max(id), 0) FROM trajectories")[0][0])

    def steps(self) -> tuple[int, int]:
        """(first, last) step of a formed batch; (0, -1) before the first."""
        first, last = self._all("SELECT coalesce(min(step), 0), coalesce(max(step), -1) FROM batches")[0]
        return first, last

    def refusals(self) -> dict[str, int]:
        """Training groups refused, by reason."""
        query = (
            "SELECT refused_because, count(*) FROM groups WHERE refused_because IS NOT NULL AND split = 'train' "
            "GROUP BY 1 ORDER BY 2 DESC"
        )
        return dict(self._all(query))

    def groups_in(self, step: int) -> list[int]:
        return [
            group for (group,) in self._all("SELECT group_id FROM groups WHERE step = ? ORDER BY group_id", (step,))
        ]

    def odd_groups(self, most: int) -> list[int]:
        """Newest groups that were refused or in which an episode failed."""
        refused = "SELECT group_id FROM groups WHERE refused_because IS NOT NULL ORDER BY group_id DESC LIMIT ?"
        found = [group for (group,) in self._all(refused, (most,))]
        failed = "SELECT DISTINCT group_id FROM trajectories WHERE id > ? AND ended IN ('error', 'aborted') LIMIT ?"
        found += [group for (group,) in self._all(failed, (self.last_id() - MOST_SCANNED, most))]
        return sorted(set(found))[-most:]

    def held_out_groups(self, most: int) -> list[int]:
        """Newest groups of held-out problems."""
        query = "SELECT group_id FROM groups WHERE split = 'eval' ORDER BY group_id DESC LIMIT ?"
        return [group for (group,) in self._all(query, (most,))]

    def held_out_twice(self, most: int) -> list[tuple[int, int]]:
        """(first group, last group) of the first `most` held-out problems that were asked more than once."""
        query = (
            "SELECT min(group_id), max(group_id) FROM groups WHERE split = 'eval' GROUP BY problem "
            "HAVING min(group_id) < max(group_id) ORDER BY 1 LIMIT ?"
        )
        return [(first, last) for first, last in self._all(query, (most,))]

    def group_range(self, first: int, last: int) -> tuple[int, int]:
        """(lowest, highest) number of the groups in the batches of these steps, both included; (0, -1) when none."""
        query = "SELECT coalesce(min(group_id), 0), coalesce(max(group_id), -1) FROM groups WHERE step BETWEEN ? AND ?"
        low, high = self._all(query, (first, last))[0]
        return low, high

    def of_groups(self, first: int, last: int) -> Iterator[Surveyed]:
        """Trajectories of the groups with these numbers, both ends included."""
        query = f"SELECT {_SURVEYED} {_WITH_GENERATOR} WHERE t.group_id BETWEEN ? AND ? ORDER BY t.group_id, t.sample"
        return self._rows(Surveyed, query, (first, last))
