"""The audit of what the sampler chose: is every decision the one that the stored trajectories prescribe?

Outcomes are counted anew from the rows of the trajectories; of what the buffer wrote of them only the order in which
the groups ended is believed. What a decision must be then is a definition that is shared (buffer/sampler.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose

import msgpack

from async_rl.buffer.sampler import Decision, Sampler, SamplerRules
from async_rl.buffer.sampler_feedback import StoredDecision
from async_rl.buffer.sampler_statistics import Outcome, Statistics
from async_rl.buffer.starts import given_tokens
from async_rl.buffer.store_reader import GroupRow, StoreReader, TrajectoryRow
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError, unpack
from async_rl.trajectory.given import given_in

CLOSE = 1e-9
"""difference of two estimates that another machine's arithmetic explains"""


def check_decisions(
    store: StoreReader, groups: Mapping[int, GroupRow], decided: Sequence[StoredDecision], rules: SamplerRules | None
) -> Iterator[str]:
    """What is wrong, in words. `rules`: None: the run has no sampler."""
    if rules is None:
        if decided:
            yield f"group {decided[0].group} was chosen by a sampler, which the settings do not have"
        return
    by_group = {one.group: one for one in decided}
    for missing in sorted(groups.keys() - by_group.keys()):
        yield f"group {missing} was admitted, and what the sampler chose for it is not stored"
    ended: list[Outcome] = []
    for stored in store.outcomes():
        counted = None
        if stored.number == len(ended) and stored.group in by_group and stored.group in groups:
            chosen = by_group[stored.group].decision
            counted = _counted(store, groups[stored.group], len(ended), chosen, rules)
        if counted != stored:
            yield f"outcome {stored.number} says {stored}; the stored trajectories say {counted}"
            return  # everything behind it would be wrong
        ended.append(stored)
    yield from _decided(groups, decided, ended, rules)
    yield from check_starts(store, groups, decided)


def _decided(
    groups: Mapping[int, GroupRow], decided: Sequence[StoredDecision], ended: Sequence[Outcome], rules: SamplerRules
) -> Iterator[str]:
    sampler, known = Sampler(rules), Statistics(rules)
    first: dict[int, Decision] = {}
    for one in decided:
        found = one.decision
        if one.attempt:
            if found != first.get(one.position):
                yield f"group {one.group}, attempt {one.attempt} at position {one.position}, asks something else"
            continue
        first[one.position] = found
        if not known.outcomes <= found.seen <= len(ended):
            yield f"group {one.group} was chosen with {found.seen} groups ended; {known.outcomes} were before it"
            return
        while known.outcomes < found.seen:
            known.add(ended[known.outcomes])
        wanted = sampler.decide(one.position, groups[one.group].admitted_version, known)
        if not _alike(wanted, found):
            yield f"group {one.group} asks {found}; with what was known then the sampler chooses {wanted}"
        known.decide(found)


def _alike(a: Decision, b: Decision) -> bool:
    same = (a.problem, a.samples, a.seen, a.max_turns, a.start) == (b.problem, b.samples, b.seen, b.max_turns, b.start)
    return same and isclose(a.estimate, b.estimate, abs_tol=CLOSE)


def _counted(store: StoreReader, row: GroupRow, number: int, chosen: Decision, rules: SamplerRules) -> Outcome:
    """What came of a group, from the rows of its trajectories."""
    tried = [t for t in store.trajectories_of(row.group) if t.ended not in ("error", "aborted")]
    good = [t for t in tried if _reward(t) > rules.chosen.success]
    return Outcome(
        number=number,
        group=row.group,
        problem=row.problem,
        attempts=len(tried),
        successes=len(good),
        tokens=sum(t.policy_length for t in tried),
        version=max((t.version_max for t in tried), default=-1),
        started=chosen.start is not None,
        turns=max((t.num_turns for t in good), default=0),
        success=min((t.sample for t in good), default=-1),
        failure=min((t.sample for t in tried if t not in good), default=-1),
    )


def _reward(row: TrajectoryRow) -> float:
    return float("-inf") if row.reward is None else row.reward


def check_starts(
    store: StoreReader, groups: Mapping[int, GroupRow], decided: Sequence[StoredDecision]
) -> Iterator[str]:
    """Whether trained answers begin with what was stored for them, token by token; where the bytes are still there."""
    for one in decided:
        start = one.decision.start
        if start is None or start.source == "field" or groups[one.group].step is None:
            continue
        stored = store.load_start(one.group)
        given = given_tokens(stored if stored is not None else msgpack.packb([b"", [], False]))
        for blob in store.load_groups([one.group]):
            try:
                trajectory = unpack(blob)
            except WireError:
                continue  # the check of the batches tells it
            if not trajectory.failed and (wrong := _wrong_start(trajectory, *given)):
                yield f"sample {trajectory.sample} of group {one.group} {wrong}"


def _wrong_start(trajectory: Trajectory, tokens: bytes, turns: tuple[tuple[int, int], ...], is_open: bool) -> str:
    """Why a trajectory does not begin as its permit said; empty: it does, or a part of that did not fit."""
    found = given_in(trajectory)
    if found is None:
        return "does not say what was given to it"
    many = len(found.stretches)
    whole = many - found.open
    if found.stretches[:whole] != turns[:whole] or many > len(turns) or (found.open and not is_open):
        return "was given other turns than its permit said"
    if many:
        start, length = found.stretches[-1]
        end = start + length
        cut_alike = start == turns[many - 1][0] and length <= turns[many - 1][1]
        if not cut_alike or trajectory.tokens[:end].astype("<i4").tobytes() != tokens[: 4 * end]:
            return "begins with other tokens than its permit said"
    return ""
