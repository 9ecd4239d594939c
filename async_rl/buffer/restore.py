"""From the rows of a store to the state machine that wrote them: a buffer comes back.

What was committed is everything that any peer was told. Not restored, because it died with its owners:
generators and what they hold (their groups wait for new ones, at their old places and at no new charge),
evaluations that were not finished (the trainer asks again), the streaks of failures and refusals.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

from async_rl.buffer.core import Core
from async_rl.buffer.depth import KEY
from async_rl.buffer.ledger import Group, Sample
from async_rl.buffer.staleness import Entry
from async_rl.buffer.store_reader import GroupRow, StoreReader, TrajectoryRow
from async_rl.trajectory.types import LENGTH_BUCKETS, attempt_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the buffer had reached."""

    step: int
    """of the next batch"""
    next_group: int
    position: int
    """next one in the prompt order"""
    dropped: tuple[tuple[int, int, str], ...]
    """(position, attempt, why) of groups refused as stale, or because the run went back, whose problem was not asked
    again"""
    depth: Mapping[str, Any] | None
    """state of the controller of the depth, if there was one"""
    lengths: tuple[tuple[str, int, int, int], ...]
    """(trained, dropped or refused; length bucket; trajectories; policy tokens)"""
    order: tuple[GroupRow, ...]
    """training groups from the oldest live one on, in order of admission"""
    samples: Mapping[int, tuple[TrajectoryRow, ...]]
    """of the live groups"""
    begun: frozenset[tuple[int, int]]
    """(group, sample) of episodes of which finished turns are kept"""
    counts: Mapping[str, int]
    tokens_generated: int
    """policy tokens of everything stored"""


def read_standing(store: StoreReader) -> Standing:
    """Reads rows of live groups and sums over the others; no payload."""
    step, next_group = store.next_numbers()
    counts = store.counts()
    live = [row.group for row in store.groups(unfinished=True) if row.split == "train"]
    order = tuple(row for row in store.groups(since=live[0]) if row.split == "train") if live else ()
    tally = Counter(
        groups_admitted=counts["groups_admitted"],
        groups_trained=counts["groups_batched"],
        groups_refused=counts["groups_refused"],
    )
    sums = store.tally()
    tokens = sums.pop("tokens_generated", 0)
    for name, count in sums.items():
        tally[name.split(":")[0]] += count
    return Standing(
        step=step,
        next_group=next_group,
        position=store.next_position(),
        dropped=tuple(store.dropped_last()),
        depth=json.loads(depth) if (depth := store.meta(KEY)) is not None else None,
        lengths=tuple(store.lengths(LENGTH_BUCKETS)),
        order=order,
        samples={group: tuple(store.trajectories_of(group)) for group in live},
        begun=frozenset(store.begun()),
        counts=dict(tally),
        tokens_generated=tokens,
    )


def restore(core: Core, standing: Standing, *, version: int) -> None:
    """Put a fresh `core` where the old one stood. The trainer begins at `version`, which may lie behind
    batches that were formed: it is answered those, and the generators start nothing too old meanwhile."""
    ledger, admission = core.ledger, core.admission
    ledger.step, ledger.next_group = standing.step, standing.next_group
    admission.position = standing.position
    admission.lost_tokens = standing.tokens_generated
    ledger.published = core.consumed = version
    core.counts.update(standing.counts)
    admission.refill = [
        (position, attempt + 1)
        for position, attempt, why in standing.dropped
        if why == "rollback" or ledger.policy.refills
    ]
    if core.batching.depth is not None and standing.depth is not None:
        core.batching.depth.restore(standing.depth)
    core.batching.discarded.restore(standing.lengths)
    for row in standing.order:
        if row.refused_because is not None:
            continue
        if row.step is not None:
            ledger.line.add(Entry(group=row.group, deadline=row.step, finished=True, trained=True))
            continue
        group = _group(core, row)
        for sample in standing.samples[row.group]:
            group.samples[sample.sample] = _sample(sample)
        group.begun.update(sample for number, sample in standing.begun if number == row.group)
        ledger.admit(group)
        if group.complete:
            ledger.finish(row.group)
        else:
            admission.orphans.append(row.group)


def _group(core: Core, row: GroupRow) -> Group:
    return Group(
        group=row.group,
        problem=row.problem,
        split="train",
        size=core.rules.group_size,
        seed=attempt_seed(core.rules.seed, row.position, row.attempt),
        temperature=core.rules.temperature,
        admitted_at=row.admitted_at,
        admitted_version=row.admitted_version,
        restored=True,
        position=row.position,
        attempt=row.attempt,
    )


def _sample(row: TrajectoryRow) -> Sample:
    return Sample(
        reward=nan if row.reward is None else row.reward,
        version_min=row.version_min,
        version_max=row.version_max,
        length=row.length,
        policy_length=row.policy_length,
        failed=row.ended in ("error", "aborted"),
    )
