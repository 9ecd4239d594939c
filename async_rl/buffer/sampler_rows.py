"""The sampler's part of the store: what was chosen for each group, and what came of it.

The tables are made when the first row is written, so that a run without a sampler has none.
"""

from __future__ import annotations

import sqlite3
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from async_rl.buffer.sampler import Decision, StartChoice
from async_rl.buffer.sampler_feedback import StoredDecision
from async_rl.buffer.sampler_statistics import Outcome

TABLES = (
    """CREATE TABLE IF NOT EXISTS decisions (
    group_id INTEGER PRIMARY KEY,
    seen INTEGER,             -- outcomes that were known
    estimate REAL,            -- success of the problem, as it was estimated
    samples INTEGER,
    max_turns INTEGER,        -- of an episode; 0: generator.max_turns
    source TEXT,              -- what its answers begin with: field, success, failure; null: nothing
    share REAL,               -- of the text or answer that is given
    of_group INTEGER, of_sample INTEGER,  -- the stored answer
    start BLOB                -- what the permit says of it
)""",
    """CREATE TABLE IF NOT EXISTS outcomes (
    number INTEGER PRIMARY KEY,  -- in the order in which the groups ended
    group_id INTEGER, problem INTEGER, attempts INTEGER, successes INTEGER, tokens INTEGER, version INTEGER,
    started INTEGER,          -- 1: its answers began with a start
    turns INTEGER,            -- of the longest success
    success INTEGER, failure INTEGER     -- lowest sample that did, and did not, succeed
)""",
)
_DECISION = (
    "SELECT group_id, position, attempt, problem, seen, estimate, samples, max_turns, source, share, of_group, "
    "of_sample FROM decisions JOIN groups USING (group_id) ORDER BY group_id"
)
_OUTCOME = "number, group_id, problem, attempts, successes, tokens, version, started, turns, success, failure"


class SamplerReader:
    """Reads the sampler's tables. Part of `StoreReader`."""

    @abstractmethod
    def _all(self, query: str, given: Sequence[Any] = ()) -> list[Any]:
        """The rows of a query."""

    def decisions(self) -> Iterator[StoredDecision]:
        """What was chosen for each group, in the order of admission; none where there was no sampler."""
        if not self._has("decisions"):
            return
        for group, position, attempt, problem, seen, estimate, samples, turns, source, *start in self._all(_DECISION):
            share, of_group, of_sample = start
            choice = None
            if source is not None:
                choice = StartChoice(source=source, share=share, group=of_group, sample=of_sample)
            decision = Decision(
                problem=problem, samples=samples, seen=seen, estimate=estimate, max_turns=turns, start=choice
            )
            yield StoredDecision(group=group, position=position, attempt=attempt, decision=decision)

    def outcomes(self) -> Iterator[Outcome]:
        """What came of the groups, in the order in which they ended."""
        if not self._has("outcomes"):
            return
        for number, group, problem, attempts, good, tokens, version, started, *more in self._all(
            f"SELECT {_OUTCOME} FROM outcomes ORDER BY number"
        ):
            turns, success, failure = more
            yield Outcome(
                number=number,
                group=group,
                problem=problem,
                attempts=attempts,
                successes=good,
                tokens=tokens,
                version=version,
                started=bool(started),
                turns=turns,
                success=success,
                failure=failure,
            )

    def load_start(self, group: int) -> bytes | None:
        """What the permit of a group says of its start (buffer/starts.py); None: it has none from a stored answer."""
        found = self._all("SELECT start FROM decisions WHERE group_id = ?", (group,)) if self._has("decisions") else []
        return found[0][0] if found else None

    def cut_last(self) -> list[tuple[int, int, int, int, str]]:
        """(group, position, attempt, problem, generator) of the pieces that have not gone on and are not refused, in
        the order of admission (buffer/windows.py)."""
        newest = "SELECT max(group_id) AS group_id FROM groups WHERE split = 'train' GROUP BY position"
        query = (
            f"SELECT group_id, position, attempt, g.problem, t.generator FROM ({newest}) "
            "JOIN groups g USING (group_id) JOIN trajectories t USING (group_id) "
            "WHERE t.ended = 'window' AND g.refused_because IS NULL ORDER BY group_id"
        )
        return [tuple(row) for row in self._all(query)]

    def _has(self, table: str) -> bool:
        return bool(self._all("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))


class SamplerWriter:
    """Writes them. Part of `Store`."""

    _tables_made = False

    @abstractmethod
    def _write(self, statement: str, values: Sequence[Any]) -> sqlite3.Cursor:
        """One statement of the open transaction."""

    def add_decision(self, group: int, decision: Decision, start: bytes | None = None) -> None:
        """Store what was chosen for a group. `start`: what its permit says of a stored answer that it starts from."""
        self._make_tables()
        chosen = decision.start
        of = (None, None, None, None) if chosen is None else (chosen.source, chosen.share, chosen.group, chosen.sample)
        self._write(
            "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (group, decision.seen, decision.estimate, decision.samples, decision.max_turns, *of, start),
        )

    def add_outcome(self, outcome: Outcome) -> None:
        """Store what came of a group."""
        self._make_tables()
        o = outcome
        counted = (o.attempts, o.successes, o.tokens, o.version, int(o.started), o.turns, o.success, o.failure)
        self._write(
            "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (o.number, o.group, o.problem, *counted)
        )

    def _make_tables(self) -> None:
        if not self._tables_made:
            for table in TABLES:
                self._write(table, ())
            self._tables_made = True
