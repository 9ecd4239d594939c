"""A buffer comes back: from the rows of a store to the state machine that wrote them (`restore`).

Everything that any peer was told is in the store. What belonged to other processes is not restored: generators and
what they hold (their groups wait for new generators, at their old places and at no new charge), evaluations that were
not finished (the trainer asks again), and the streaks of failures and refusals.
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
from async_rl.buffer.ledger import MOST_REASON, Group, SampleRecord
from async_rl.buffer.poison import KEY as POISON_KEY
from async_rl.buffer.pool_restore import StoredPool, read_pool, restore_pool
from async_rl.buffer.sampler import Decision
from async_rl.buffer.sampler_feedback import StoredDecision
from async_rl.buffer.sampler_statistics import Outcome
from async_rl.buffer.staleness import Slot
from async_rl.buffer.store_reader import GroupRow, StoreReader, TrajectoryRow
from async_rl.buffer.verification import FABRICATED
from async_rl.buffer.verification import KEY as QUARANTINE_KEY
from async_rl.buffer.windows import Piece
from async_rl.trajectory.types import LENGTH_BUCKETS, attempt_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """What the buffer had reached, as the store tells it."""

    step: int
    """of the next batch"""
    next_group: int
    position: int
    """next one in the prompt order"""
    dropped: tuple[tuple[int, int, str], ...]
    """(position, attempt, why) of groups refused as stale, because the run went back or its generator lied, whose
    problem was not asked again"""
    depth: Mapping[str, Any] | None
    """state of the controller of the depth, if there was one"""
    poison: Mapping[str, Any] | None
    """deaths by problem, and the problems that are refused for them"""
    quarantine: Mapping[str, Any] | None
    """generators that stay out"""
    lengths: tuple[tuple[str, int, int, int], ...]
    """(trained, dropped or refused; length bucket; trajectories; policy tokens)"""
    order: tuple[GroupRow, ...]
    """training groups from the oldest live one on, in order of admission"""
    samples: Mapping[int, tuple[TrajectoryRow, ...]]
    """of the live groups"""
    begun: frozenset[tuple[int, int]]
    """(group, sample) of episodes of which finished turns are kept"""
    counts: Mapping[str, int]
    failures: tuple[tuple[str, int], ...]
    """(reason, trajectories that failed)"""
    tokens_generated: int
    """policy tokens of everything stored"""
    pool: StoredPool | None = None
    """what the experience pool follows from, if there is one"""
    decided: tuple[StoredDecision, ...] = ()
    """what the sampler chose, in order of admission"""
    outcomes: tuple[Outcome, ...] = ()
    """what came of it, in the order in which the groups ended"""
    pieces: tuple[Piece, ...] = ()
    """of episodes that wait to go on"""


def read_state(store: StoreReader) -> StoredState:
    """The state that a store holds: rows of live groups, and sums over the others; no payload is read."""
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
    return StoredState(
        step=step,
        next_group=next_group,
        position=store.next_position(),
        dropped=tuple(store.dropped_last()),
        depth=json.loads(depth) if (depth := store.meta(KEY)) is not None else None,
        poison=json.loads(poison) if (poison := store.meta(POISON_KEY)) is not None else None,
        quarantine=json.loads(kept) if (kept := store.meta(QUARANTINE_KEY)) is not None else None,
        lengths=tuple(store.lengths(LENGTH_BUCKETS)),
        order=order,
        samples={group: tuple(store.trajectories_of(group)) for group in live},
        begun=frozenset(store.begun()),
        counts=dict(tally),
        failures=tuple(store.failures()),
        tokens_generated=tokens,
        pool=read_pool(store),
        decided=tuple(store.decisions()),
        outcomes=tuple(store.outcomes()),
        pieces=tuple(_piece(*row) for row in store.cut_last()),
    )


def restore(core: Core, stored: StoredState, *, version: int) -> None:
    """Bring a fresh `core` to the stored state. The trainer begins at `version`, which may lie behind batches that were
    formed: it is answered those, and the generators start nothing too old meanwhile."""
    ledger, admission = core.ledger, core.admission
    ledger.step, ledger.next_group = stored.step, stored.next_group
    admission.position = stored.position
    admission.lost_tokens = admission.arrived_tokens = stored.tokens_generated
    ledger.published = core.consumed = version
    core.counts.update(stored.counts)
    for reason, count in stored.failures:
        core.failures.add(reason, count)
    admission.refill = [
        (position, attempt + 1)
        for position, attempt, why in stored.dropped
        if why in ("rollback", FABRICATED) or ledger.policy.refills
    ]
    admission.windows.waiting = list(stored.pieces)
    if stored.poison is not None:
        core.poison.restore(stored.poison)
    if stored.quarantine is not None:
        core.trust.quarantine.restore(stored.quarantine)
    if core.batching.depth is not None and stored.depth is not None:
        core.batching.depth.restore(stored.depth)
    core.batching.discarded.restore(stored.lengths)
    if stored.pool is not None:
        restore_pool(core.batching.pool, stored.pool)
    decided = {one.group: one.decision for one in stored.decided}
    for row in stored.order:
        if row.refused_because is not None:
            continue
        if row.step is not None:
            ledger.queue.add(Slot(group=row.group, deadline=row.step, finished=True, trained=True))
            continue
        group = _group(core, row, decided.get(row.group))
        for sample in stored.samples[row.group]:
            group.samples[sample.sample] = _sample(sample)
            group.senders.add(sample.generator)
        group.begun.update(sample for number, sample in stored.begun if number == row.group)
        ledger.admit(group)
        if group.complete:
            ledger.finish(row.group)
        else:
            admission.orphans.append(row.group)
    if admission.feedback is not None:
        admission.feedback.restore(stored.decided, stored.outcomes, admission.refill)


def _piece(group: int, position: int, attempt: int, problem: int, generator: str) -> Piece:
    return Piece(
        group=group,
        position=position,
        attempt=attempt,
        problem=problem,
        generator=generator,
        senders=(generator,),
    )


def _group(core: Core, row: GroupRow, decision: Decision | None) -> Group:
    return Group(
        permit=core.rules.permit(
            group=row.group,
            problem=row.problem,
            seed=attempt_seed(core.rules.seed, row.position, row.attempt),
            decision=decision,
        ),
        admitted_at=row.admitted_at,
        admitted_version=row.admitted_version,
        restored=True,
        decision=decision,
        position=row.position,
        attempt=row.attempt,
    )


def _sample(row: TrajectoryRow) -> SampleRecord:
    failed = row.ended in ("error", "aborted")
    return SampleRecord(
        reward=nan if row.reward is None else row.reward,
        version_min=row.version_min,
        version_max=row.version_max,
        length=row.length,
        policy_length=row.policy_length,
        failed=failed,
        generator=row.generator,
        num_turns=row.num_turns,
        reason=row.reason[:MOST_REASON] if failed else "",
        cut=row.ended == "window",
    )
