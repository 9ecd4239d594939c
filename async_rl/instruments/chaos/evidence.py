"""What a store said before a death must still be true after it.

An audit of the end alone cannot see a group that was stored, forgotten, and admitted anew under its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from async_rl.buffer.store_reader import GroupRow, StoreReader
from async_rl.observe.audit import Violation


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEvidence:
    """What was committed at one moment."""

    groups: Mapping[int, GroupRow]
    batches: Mapping[int, tuple[int, ...]]
    """step -> groups"""
    samples: frozenset[tuple[int, int]]
    """(group, sample) that waited for a batch"""


def take_evidence(store: StoreReader) -> StoreEvidence:
    """Read it, rows only."""
    waiting = [row.group for row in store.groups(unfinished=True) if row.split == "train"]
    return StoreEvidence(
        groups={row.group: row for row in store.groups()},
        batches={batch.step: batch.groups for batch in store.batches()},
        samples=frozenset((t.group, t.sample) for group in waiting for t in store.trajectories_of(group)),
    )


def taken_back(evidence: StoreEvidence, store: StoreReader) -> Iterator[Violation]:
    """What has been taken back since. A group may only go on: into a batch, or to a refusal."""
    groups = {row.group: row for row in store.groups()}
    batches = {batch.step: batch.groups for batch in store.batches()}
    for number, before in evidence.groups.items():
        now = groups.get(number)
        if now is None:
            gone = f"group {number} was in the store when a process died, and is not any more"
            yield Violation(kind="lost", what=gone)
            continue
        if (now.problem, now.position, now.attempt) != (before.problem, before.position, before.attempt):
            yield Violation(
                kind="duplicated",
                what=f"group {number} was problem {before.problem} at position {before.position} when a process died; "
                f"now it is problem {now.problem} at position {now.position}",
            )
        for what, earlier, later in (
            ("in the batch of step", before.step, now.step),
            ("refused:", before.refused_because, now.refused_because),
        ):
            if earlier is not None and earlier != later:
                yield Violation(
                    kind="lost", what=f"group {number} was {what} {earlier} when a process died, then {what} {later}"
                )
    for step, members in evidence.batches.items():
        if batches.get(step) != members:
            yield Violation(
                kind="batch",
                what=f"the batch of step {step} was {members} when a process died, then {batches.get(step)}",
            )
    kept = {(t.group, t.sample) for group in {g for g, _ in evidence.samples} for t in store.trajectories_of(group)}
    for group, sample in sorted(evidence.samples - kept):
        yield Violation(
            kind="lost", what=f"sample {sample} of group {group} was stored when a process died, and is not any more"
        )
