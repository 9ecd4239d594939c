"""The pool of a buffer that begins, or comes back: from the stored batches to the pool that formed them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.buffer.demonstrations import read_demonstrations
from async_rl.buffer.ledger import SampleRecord
from async_rl.buffer.pool import KEY, FreshGroup, Member, Pool
from async_rl.buffer.store import Store
from async_rl.buffer.store_reader import StoreReader, TrajectoryRow
from async_rl.trajectory.reuse import Drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPool:
    """All that the pool of a run follows from."""

    demonstrations: tuple[Member, ...]
    batches: tuple[tuple[int, tuple[FreshGroup, ...], Drawn], ...]
    """(step, fresh groups in their order, what came back)"""
    forgotten: Mapping[str, Any] | None
    """generators that lied"""


def open_pool(store: Store, pool: Pool, demonstrations: Path) -> None:
    """Have the store of a run with a pool hold its tables, and the demonstrations of the run's folder. The pool of a
    new run knows of them then; that of one that goes on is restored behind it."""
    if pool.on and not store.has_pool():
        store.make_pool()
        store.add_demonstrations(read_demonstrations(demonstrations))
        store.commit()
    if pool.on and store.next_numbers()[0] == 0:
        pool.know(store.demonstrations())


def read_pool(store: StoreReader) -> StoredPool | None:
    """From the rows; no payload is read. None: the run has no pool."""
    if not store.has_pool():
        return None
    samples: dict[int, dict[int, SampleRecord]] = {}
    problems: dict[int, int] = {}
    sizes: Counter[int] = Counter()
    for row in store.rows_in_batches():
        problems[row.group] = row.problem
        sizes[row.group] += 1
        of_group = samples.setdefault(row.group, {})
        if row.ended not in ("error", "aborted"):
            of_group[row.sample] = _sample(row)
    batches = [
        (
            batch.step,
            tuple(
                FreshGroup(group=g, problem=problems[g], size=sizes[g], samples=dict(sorted(samples[g].items())))
                for g in batch.groups
            ),
            store.drawn(batch.step),
        )
        for batch in store.batches()
    ]
    forgotten = store.meta(KEY)
    return StoredPool(
        demonstrations=tuple(store.demonstrations()),
        batches=tuple(batches),
        forgotten=None if forgotten is None else json.loads(forgotten),
    )


def restore_pool(pool: Pool, stored: StoredPool) -> None:
    """Bring a fresh pool to where the one that stored the batches was behind the last of them."""
    if stored.batches:  # else it was opened with them
        pool.know(stored.demonstrations)
    if stored.forgotten is not None:
        pool.restore(stored.forgotten)
    for step, groups, drawn in stored.batches:
        pool.expire(step)
        pool.use(drawn.rows)
        pool.add(groups)


def _sample(row: TrajectoryRow) -> SampleRecord:
    return SampleRecord(
        reward=float("nan") if row.reward is None else row.reward,
        version_min=row.version_min,
        version_max=row.version_max,
        length=row.length,
        policy_length=row.policy_length,
        failed=False,
        generator=row.generator,
        num_turns=row.num_turns,
    )
