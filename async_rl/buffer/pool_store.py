"""What the store keeps of the experience pool: which rows came back in which batch, demonstrations, and payloads of
trajectories that may still come back although those of their batches are deleted.

The tables are there only in runs with a pool. A row is stored in the commit that forms its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from async_rl.buffer.pool import Member, Name
from async_rl.trajectory.beginnings import name_of
from async_rl.trajectory.codec import Blob, pack, unpack
from async_rl.trajectory.reuse import Drawn, Reuse, without_effect
from async_rl.trajectory.types import Trajectory

POOL_TABLES = (
    """CREATE TABLE IF NOT EXISTS reused (
    step INTEGER, place INTEGER,  -- order behind the fresh trajectories of the batch
    source TEXT, group_id INTEGER, sample INTEGER,  -- of the stored trajectory; of a demonstration 0 and its number
    as_group INTEGER, as_sample INTEGER,  -- in this batch
    uses INTEGER, age INTEGER,  -- with this time; steps
    advantage REAL, baseline REAL, scale REAL,
    PRIMARY KEY (step, place)
)""",
    "CREATE INDEX IF NOT EXISTS reused_by_group ON reused (group_id)",
    """CREATE TABLE IF NOT EXISTS without_effect (
    step INTEGER, group_id INTEGER, sample INTEGER,  -- fresh trajectories whose place rows of the pool have
    PRIMARY KEY (step, group_id, sample)
)""",
    """CREATE TABLE IF NOT EXISTS demonstrations (
    number INTEGER PRIMARY KEY, problem INTEGER, reward REAL, payload BLOB
)""",
    """CREATE TABLE IF NOT EXISTS pool_payloads (
    group_id INTEGER, sample INTEGER, payload BLOB,  -- whole, where that of the batch is deleted
    PRIMARY KEY (group_id, sample)
)""",
)
_REUSED = "source, group_id, sample, as_group, as_sample, uses, age, advantage, baseline, scale"
_FIELDS = ("source", "group", "sample", "as_group", "as_sample", "uses", "age", "advantage", "baseline", "scale")


class PoolReader(ABC):
    """The part of a store's reader that knows of the pool."""

    _pool_there: bool = False

    @abstractmethod
    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]: ...

    @abstractmethod
    def load_one(self, group: int, sample: int) -> bytes | None: ...

    def has_pool(self) -> bool:
        """Whether the run has a pool."""
        if not self._pool_there:  # a run's first process makes the tables before the first batch
            self._pool_there = bool(self._all("SELECT 1 FROM sqlite_master WHERE name = 'reused'"))
        return self._pool_there

    def drawn(self, step: int) -> Drawn:
        """What of the pool is in the batch of `step`."""
        if not self.has_pool():
            return Drawn()
        rows = self._all(f"SELECT {_REUSED} FROM reused WHERE step = ? ORDER BY place", (step,))
        if not rows:
            return Drawn()
        out = self._all("SELECT group_id, sample FROM without_effect WHERE step = ? ORDER BY 1, 2", (step,))
        return Drawn(
            rows=tuple(Reuse(**dict(zip(_FIELDS, row, strict=True))) for row in rows),
            out=tuple((group, sample) for group, sample in out),
        )

    def load_stored(self, row: Reuse) -> bytes | None:
        """The blob of the trajectory that comes back, as it was stored; None: it is deleted with all of its batch."""
        found: bytes | None
        if row.source == "demonstrations":
            kept = self._all("SELECT payload FROM demonstrations WHERE number = ?", (row.sample,))
            found = kept[0][0] if kept else None
        else:
            found = self.load_one(row.group, row.sample)
            if found is None:
                query = "SELECT payload FROM pool_payloads WHERE group_id = ? AND sample = ?"
                kept = self._all(query, (row.group, row.sample))
                found = kept[0][0] if kept else None
        return found

    def load_reused(self, rows: Iterable[Reuse]) -> Iterator[bytes]:
        """The blobs of rows of a batch."""
        for row in rows:
            if (found := self.load_stored(row)) is not None:
                yield pack(row.put_on(unpack(found)))

    def with_pool(self, step: int, fresh: list[bytes]) -> list[bytes]:
        """The batch of `step` from the whole blobs of its fresh trajectories: those in whose place others are trained
        say so, and the rows of the pool follow."""
        drawn = self.drawn(step)
        return [*_marked(fresh, drawn), *self.load_reused(drawn.rows)] if drawn else fresh

    def part_with_pool(
        self, drawn: Drawn, fresh: Sequence[tuple[int, int]], *, after: int, most_bytes: int
    ) -> tuple[int, list[Blob]]:
        """`StoreReader.load_part` of a batch in which something came back. fresh: its (group, sample), in order."""
        found: list[Blob] = []
        taken = 0
        for place in range(after, len(fresh) + len(drawn.rows)):
            if place < len(fresh):
                whole = self.load_one(*fresh[place])
                assert whole is not None
                (blob,) = _marked([whole], drawn)
            else:
                (blob,) = self.load_reused([drawn.rows[place - len(fresh)]])
            if found and taken + len(blob) > most_bytes:
                break
            found.append(blob)
            taken += len(blob)
        return len(fresh) + len(drawn.rows), found

    def demonstrations(self) -> list[Member]:
        """All there are, without their tokens."""
        if not self.has_pool():
            return []
        rows = self._all("SELECT number, problem, reward FROM demonstrations ORDER BY number")
        return [Member(group=0, sample=n, problem=problem, reward=reward, oldest=-1) for n, problem, reward in rows]


class PoolWriter(PoolReader):
    """The part of the store that keeps the pool."""

    @abstractmethod
    def _write(self, statement: str, values: Sequence[Any]) -> Any: ...

    def make_pool(self) -> None:
        """The tables, if they are not there."""
        for statement in POOL_TABLES:
            self._write(statement, ())

    def add_reused(self, step: int, drawn: Drawn) -> None:
        """These come back in the batch of `step`, which is formed in the same commit."""
        for place, row in enumerate(drawn.rows):
            values = tuple(getattr(row, name) for name in _FIELDS)
            marks = ", ".join("?" * (2 + len(values)))
            self._write(f"INSERT INTO reused (step, place, {_REUSED}) VALUES ({marks})", (step, place, *values))
        for group, sample in drawn.out:
            self._write("INSERT INTO without_effect VALUES (?, ?, ?)", (step, group, sample))

    def add_demonstrations(self, shown: Iterable[tuple[int, Trajectory]]) -> None:
        """shown: (training problem that it answers, or -1; the demonstration)."""
        for number, (problem, t) in enumerate(shown):
            self._write("INSERT INTO demonstrations VALUES (?, ?, ?, ?)", (number, problem, t.reward, pack(t)))

    def forget_reused(self, *, since: int) -> None:
        """The batches of the steps from `since` on are given up."""
        if self.has_pool():
            for table in ("reused", "without_effect"):
                self._write(f"DELETE FROM {table} WHERE step >= ?", (since,))

    def spare_pool(self, groups: Sequence[int], members: Collection[Name], *, since: int) -> None:
        """Before the payloads of these groups are deleted: keep those of the pool's members, and of what came back in
        a batch from step `since` on. What was kept before and is neither any more is deleted."""
        if not self.has_pool():
            return
        again = {
            (group, sample)
            for group, sample in self._all(
                "SELECT DISTINCT group_id, sample FROM reused WHERE step >= ? AND source != 'demonstrations'", (since,)
            )
        }
        needed = again.union(members)
        for group, sample in self._all("SELECT group_id, sample FROM pool_payloads"):
            if (group, sample) not in needed:
                self._write("DELETE FROM pool_payloads WHERE group_id = ? AND sample = ?", (group, sample))
        going = set(groups)
        for name in sorted(needed):
            if name[0] in going and (blob := self.load_one(*name)) is not None:
                self._write("INSERT OR IGNORE INTO pool_payloads VALUES (?, ?, ?)", (*name, blob))


def _marked(blobs: Iterable[bytes], drawn: Drawn) -> Iterator[bytes]:
    """Those without effect say so."""
    out = set(drawn.out)
    for blob in blobs:
        yield pack(without_effect(unpack(blob))) if out and name_of(blob) in out else blob
