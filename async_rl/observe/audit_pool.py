"""The audit of what came back from the experience pool: within its own bounds, unchanged, and what the stored batches
prescribe. Ages are computed from the version spans of the tokens, uses by counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from async_rl.buffer.pool import FreshGroup, Pool
from async_rl.buffer.pool_restore import read_pool
from async_rl.buffer.store_reader import GroupRow, StoreReader
from async_rl.config.pool import PoolSettings
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError, unpack
from async_rl.trajectory.reuse import Drawn, Reuse, has_no_effect, reuse_of


@dataclass(slots=True, kw_only=True)
class PoolAudit:
    """What came back in a run."""

    by_source: Counter[str] = field(default_factory=Counter)
    """rows"""
    replaced: int = 0
    """fresh trajectories that are without effect"""
    age_max: int = 0
    """steps"""
    uses_max: int = 0
    wrong: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """In a line; empty where nothing came back."""
        if not self.by_source:
            return ""
        rows = ", ".join(f"{count} {source}" for source, count in sorted(self.by_source.items()))
        return f"{rows} came back, at most {self.age_max} steps old and {self.uses_max} times; {self.replaced} replaced"


def audit_pool(store: StoreReader, groups: Mapping[int, GroupRow], settings: PoolSettings, seed: int) -> PoolAudit:
    """Check every row that came back. seed: of the run."""
    found = PoolAudit()
    stored = read_pool(store)
    if stored is None:
        if settings.source != "none":
            found.wrong.append("the store holds no pool, and the settings name one")
        return found
    pool = Pool(settings=settings, seed=seed)
    pool.know(stored.demonstrations)
    if stored.forgotten is not None:
        pool.restore(stored.forgotten)
    uses: Counter[tuple[int, int]] = Counter()
    for step, fresh, drawn in stored.batches:
        found.replaced += len(drawn.out)
        for row in drawn.rows:
            found.by_source[row.source] += 1
            uses[row.group, row.sample] += 1
            found.uses_max = max(found.uses_max, row.uses)
            found.wrong += [f"{_name(row, step)} {what}" for what in _wrong_row(row, step, groups, uses, settings)]
        if step >= store.first_step():
            found.wrong += _wrong_bytes(store, step, drawn, settings, found)
        if (again := _prescribed(pool, step, fresh, drawn)) is not None:
            found.wrong.append(f"step {step}: {len(drawn.rows)} rows came back, the batches before prescribe {again}")
            return found  # everything behind it would be wrong
    return found


def _prescribed(pool: Pool, step: int, fresh: Sequence[FreshGroup], drawn: Drawn) -> str | None:
    """What should have come back, in words; None: that did."""
    pool.expire(step)
    due = pool.draw(step, fresh)
    if due != drawn:
        return f"{len(due.rows)} others" if len(due.rows) == len(drawn.rows) else str(len(due.rows))
    pool.use(drawn.rows)
    pool.add(fresh)
    return None


def _wrong_row(
    row: Reuse, step: int, groups: Mapping[int, GroupRow], uses: Mapping[tuple[int, int], int], settings: PoolSettings
) -> Iterator[str]:
    """What is wrong with a row by the tables."""
    if row.source != settings.source:
        yield f"comes from {row.source}, and the settings name {settings.source}"
    if row.uses != uses[row.group, row.sample]:
        yield f"says that it came back {row.uses} times; it did {uses[row.group, row.sample]}"
    if settings.max_uses and row.uses > settings.max_uses:
        yield f"came back {row.uses} times, at most {settings.max_uses} are allowed"
    if row.source == "demonstrations":
        return
    known = groups.get(row.group)
    if known is None or known.step is None or known.step >= step:
        yield "was in no batch before"


def _wrong_bytes(
    store: StoreReader, step: int, drawn: Drawn, settings: PoolSettings, found: PoolAudit
) -> Iterator[str]:
    """What is wrong with the rows of a batch by the bytes that a trainer is answered."""
    try:
        batch = [unpack(blob) for blob in store.load_batch(step) or ()]
    except WireError as error:
        yield f"step {step} cannot be read: {error}"
        return
    back = [(t, row) for t in batch if (row := reuse_of(t)) is not None]
    if tuple(row for _, row in back) != drawn.rows:
        yield f"step {step} answers {len(back)} rows of the pool, other ones than the {len(drawn.rows)} stored with it"
        return
    out = tuple(sorted((t.group, t.sample) for t in batch if has_no_effect(t)))
    if out != drawn.out:
        yield f"step {step} answers {len(out)} fresh trajectories without effect; {len(drawn.out)} are stored"
    for t, row in back:
        blob = store.load_stored(row)
        if blob is None or not _same(t, unpack(blob)):
            yield f"{_name(row, step)} is not what was stored"
        if row.source == "demonstrations":
            continue
        age = step - min(span.version for span in t.versions if span.end > span.start)
        found.age_max = max(found.age_max, age)
        if settings.max_age and age > settings.max_age:
            yield f"{_name(row, step)} is {age} steps old, at most {settings.max_age} are allowed"
        if row.age < age or (row.source != "groups" and row.age != age):
            yield f"{_name(row, step)} says that it is {row.age} steps old; it is {age}"


def _same(row: Trajectory, stored: Trajectory) -> bool:
    """Whether tokens, log-probs, versions, turns and reward are those that were stored."""
    return (
        row.tokens.tobytes() == stored.tokens.tobytes()
        and row.log_behaviour.tobytes() == stored.log_behaviour.tobytes()
        and (row.versions, row.turns, row.reward) == (stored.versions, stored.turns, stored.reward)
    )


def _name(row: Reuse, step: int) -> str:
    if row.source == "demonstrations":
        return f"demonstration {row.sample}, trained at step {step},"
    return f"sample {row.sample} of group {row.group}, back at step {step},"
