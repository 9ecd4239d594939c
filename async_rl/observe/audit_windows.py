"""The audit of episodes that were trained in pieces (`rollout.window`): does each go on once, from all that it said?

The chain of an episode's pieces is read from what was stored when each went on; that no token is trained twice is
counted from the stored trajectories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from async_rl.buffer.sampler_feedback import StoredDecision
from async_rl.buffer.store_reader import GroupRow, StoreReader
from async_rl.buffer.windows import SOURCE
from async_rl.observe.audit_sampler import check_starts
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError, unpack
from async_rl.trajectory.given import given_in


@dataclass(slots=True, kw_only=True)
class Pieces:
    """The episodes of a run, as chains of groups."""

    before: dict[int, int] = field(default_factory=dict)
    """group -> that which its episode went on from"""
    cut: set[int] = field(default_factory=set)
    """groups whose episode goes on"""
    groups: int = 0
    """all training groups"""
    waiting: int = 0
    """groups that were cut, are not refused, and have not gone on"""
    wrong: list[str] = field(default_factory=list)
    """in words"""

    def longest(self) -> int:
        """Most pieces of one episode."""
        length: dict[int, int] = {}
        for group in sorted(self.before):
            length[group] = length.get(self.before[group], 1) + 1
        return max(length.values(), default=1)

    def describe(self) -> str:
        """In words; empty: no episode was cut."""
        if not self.cut:
            return ""
        episodes = self.groups - len(self.before)
        return (
            f"{self.groups} of {episodes} episodes; {len(self.cut)} were cut, {len(self.before)} of them went on, "
            f"{self.waiting} wait; {self.longest()} pieces at most"
        )


def audit_pieces(
    store: StoreReader, groups: Mapping[int, GroupRow], decided: Sequence[StoredDecision], window: int
) -> Pieces:
    """Follow every episode from piece to piece. `window`: 0: episodes are whole."""
    rows = [row for row in store.trajectories(split="train") if row.ended == "window"]
    found = Pieces(groups=len(groups), cut={row.group for row in rows})
    if not window:
        found.wrong += [f"group {row.group} was cut, where episodes are whole" for row in rows[:1]]
        return found
    length = {row.group: row.policy_length for row in rows}
    wrong = [group for group, tokens in length.items() if tokens != window]
    found.wrong += [f"group {group} was cut behind {length[group]} tokens instead of {window}" for group in wrong]
    used: dict[int, int] = {}
    for one in decided:
        start = one.decision.start
        if start is None or start.source != SOURCE or one.group not in groups:
            found.wrong.append(f"group {one.group} was chosen by a sampler, which the settings do not have")
            continue
        if start.group not in found.cut or start.group not in groups or start.group >= one.group:
            found.wrong.append(f"group {one.group} goes on from group {start.group}, which was not cut")
            continue
        a, b = groups[start.group], groups[one.group]
        if (a.position, a.attempt, a.problem) != (b.position, b.attempt, b.problem):
            found.wrong.append(f"group {b.group} goes on from group {a.group}, which asks something else")
        if a.group in used:
            found.wrong.append(f"group {a.group} goes on in group {used[a.group]} and in group {b.group}")
        used[a.group] = b.group
        found.before[b.group] = a.group
    found.waiting = sum(1 for group in found.cut - used.keys() if groups[group].refused_because is None)
    found.wrong += check_starts(store, groups, decided)
    for group, earlier in found.before.items():
        if groups[group].step is not None:
            found.wrong += _repeated(store, earlier, group)
    return found


def _repeated(store: StoreReader, earlier: int, group: int) -> list[str]:
    """What a piece samples anew of what was said before it; where the bytes are still there."""
    first, second = _one(store, earlier), _one(store, group)
    if first is None or second is None or second.failed:
        return []
    given = given_in(second)
    places = {p for start, n in (given.stretches if given is not None else ()) for p in range(start, start + n)}
    said = set(first.policy_positions().tolist())
    end = max(said) + 1
    if said <= places and second.tokens[:end].tolist() == first.tokens[:end].tolist():
        return []
    return [f"group {group} does not begin with what group {earlier} said, so tokens are lost or trained twice"]


def _one(store: StoreReader, group: int) -> Trajectory | None:
    blob = store.load_one(group, 0)
    try:
        return None if blob is None else unpack(blob)
    except WireError:
        return None  # the check of the batches tells it
