"""What cannot be is refused, counted under a closed list, told to its sender, and changes nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support_buffer import TRAINER, answer, make_core

from async_rl.buffer import effects as do
from async_rl.buffer.acceptance import ANSWERS_AT_ONCE, EXAMPLES, MOST_EVALUATIONS
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.codec import WireError
from async_rl.trajectory.types import GREEDY
from async_rl.wire import messages as msg
from async_rl.wire.frames import HARMLESS, REFUSALS

PACE = PacePolicy(groups_per_step=2, max_staleness=2, pipeline_depth=3.0, window=1)
HELLO = msg.Hello(role="generator", name="g", pid=1)
STATUS = msg.Status(name="g", version=0, busy_seconds=1, wall_seconds=1, tokens_generated=1, running=1, waiting=0)
EVALUATE = msg.Evaluate(evaluation=0, version=0, problems=(3,), samples=1, temperature=1.0)


def told(effects: list[do.Effect], kind: type) -> list[Any]:
    return [e.message for e in effects if isinstance(e, do.Send) and isinstance(e.message, kind)]


def permits(effects: list[do.Effect]) -> list[msg.Permit]:
    return [permit for message in told(effects, msg.Permits) for permit in message.permits]


def refusals(effects: list[do.Effect]) -> list[msg.Refused]:
    return told(effects, msg.Refused)


@pytest.fixture
def core() -> Core:
    """Two generators, of which `a` holds two groups, under weights of version 1."""
    core = make_core(PACE, vocabulary=100, max_permits=4)
    core.handle(b"a", HELLO, 0.0)
    core.handle(b"b", HELLO, 0.0)
    first = permits(core.handle(b"a", msg.Want(limit=2, version=0), 0.0))
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    core.handle(b"a", msg.Finished(trajectories=tuple(answer(p, s, 0) for p in first for s in p.samples)), 0.0)
    core.handle(TRAINER, msg.Published(version=1), 0.0)
    core.handle(b"a", msg.Holds(version=1), 0.0)
    core.handle(b"a", msg.Want(limit=4, version=1), 0.0)
    assert core.step == 1
    assert sorted(core.groups) == [2, 3]
    return core


def given(core: Core) -> Trajectory:
    """What `a` should answer for the first sample of its first group."""
    return answer(core.groups[2].permit_missing(), 0, 1)


def state(core: Core) -> Any:
    """Everything but the counters of refusals and when who was heard."""
    generators = copy.deepcopy(core.admission.generators)
    return copy.deepcopy((core.ledger, core.evaluations, core.published, core.pending, core.ended)), generators


IMPOSSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("number", {"info": {"pool/source": "best"}}),
    ("group", {"group": 77}),
    ("group", {"group": 2**62}),
    ("permit", {"sample": 2}),
    ("permit", {"problem": 3}),
    ("permit", {"split": "eval"}),
    ("permit", {"seed": 12}),
    ("permit", {"temperature": 0.5}),
    ("permit", {"temperature": math.nan}),
    ("version", {"versions": (VersionSpan(version=2, start=1, end=2),)}),
    ("version", {"versions": (VersionSpan(version=0, start=1, end=2),)}),
    ("tokens", {"tokens": np.array([1, 100], np.int32)}),
    ("tokens", {"turns": (Turn(start=0, length=1),), "versions": (VersionSpan(version=1, start=0, end=1),)}),
    ("number", {"turns": (Turn(start=1, length=1, temperature=GREEDY),)}),
    ("number", {"turns": (Turn(start=1, length=1, temperature=1e-5),)}),
]


@pytest.mark.parametrize(("kind", "changes"), IMPOSSIBLE)
@pytest.mark.parametrize("message", [msg.Finished, msg.Turns])
def test_a_trajectory_that_cannot_be_is_refused_and_does_not_disturb_the_group(
    core: Core, message: type, kind: str, changes: dict[str, Any]
) -> None:
    before = state(core)
    forged = replace(given(core), **changes)
    effects = core.handle(b"a", message(trajectories=(forged,)), 1.0)
    assert [(r.kind, r.pairs) for r in refusals(effects)] == [(kind, ((forged.group, forged.sample),))]
    assert all(isinstance(e, do.Send | do.RecordRefusal) for e in effects)
    assert core.refusals.counts == {kind: 1}
    assert state(core) == before
    effects = core.handle(b"a", msg.Finished(trajectories=(forged, given(core))), 1.0)
    assert [accepted.pairs for accepted in told(effects, msg.Accepted)] == [((2, 0),)]
    assert core.groups[2].missing == (1,)


def test_versions_may_go_down_only_behind_turns_that_another_generator_had_sampled(core: Core) -> None:
    core.ledger.step = 3
    spans = (VersionSpan(version=3, start=1, end=2), VersionSpan(version=1, start=2, end=3))
    mixed = replace(
        given(core),
        tokens=np.array([1, 2, 3], np.int32),
        log_behaviour=np.array([0.0, -1.0, -1.0], np.float32),
        turns=(Turn(start=1, length=1), Turn(start=2, length=1)),
        versions=spans,
    )
    assert mixed.check() is None
    assert refusals(core.handle(b"a", msg.Finished(trajectories=(mixed,)), 1.0))[0].kind == "version"
    core.groups[2].begun.add(0)
    assert not refusals(core.handle(b"a", msg.Finished(trajectories=(mixed,)), 1.0))
    again = core.handle(b"a", msg.Finished(trajectories=(mixed,)), 2.0)
    assert not refusals(again), "the answer got lost: it is sent again, and what was begun is forgotten by then"
    assert [accepted.pairs for accepted in told(again, msg.Accepted)] == [((2, 0),)]


def two_contexts(core: Core, versions: tuple[VersionSpan, ...]) -> Trajectory:
    """Tokens 1 and 2 of the first context and 5 of the second, which begins at 3, are sampled."""
    core.ledger.step = 3
    return replace(
        given(core),
        tokens=np.array([1, 2, 3, 1, 2, 4], np.int32),
        log_behaviour=np.array([0, -1, -1, 0, 0, -1], np.float32),
        turns=(Turn(start=1, length=2, agent="a", temperature=0.5), Turn(start=5, length=1, agent="b")),
        versions=versions,
        contexts=(3,),
    )


def test_contexts_that_were_sampled_in_turn_may_lie_behind_newer_ones(core: Core) -> None:
    down = (VersionSpan(version=3, start=1, end=3), VersionSpan(version=2, start=5, end=6))
    assert not refusals(core.handle(b"a", msg.Finished(trajectories=(two_contexts(core, down),)), 1.0))


def test_within_a_context_versions_never_go_down(core: Core) -> None:
    spans = [VersionSpan(version=3, start=1, end=2), VersionSpan(version=2, start=2, end=6)]
    trajectory = two_contexts(core, tuple(spans))
    assert refusals(core.handle(b"a", msg.Finished(trajectories=(trajectory,)), 1.0))[0].kind == "version"
    spans[1:] = [VersionSpan(version=2, start=2, end=3), VersionSpan(version=1, start=5, end=6)]
    trajectory = two_contexts(core, tuple(spans))
    assert refusals(core.handle(b"a", msg.Finished(trajectories=(trajectory,)), 1.0))[0].kind == "version"


def test_an_evaluation_may_have_greedy_turns(core: Core) -> None:
    core.handle(TRAINER, replace(EVALUATE, version=1), 1.0)
    (permit,) = permits(core.handle(b"b", msg.Want(limit=1, version=1), 1.0))
    assert permit.split == "eval"
    greedy = answer(permit, 0, 1, turns=(Turn(start=1, length=1, temperature=GREEDY),))
    assert not refusals(core.handle(b"b", msg.Finished(trajectories=(greedy,)), 2.0))


def test_a_group_of_another_generator_is_not_taken_but_that_of_an_earlier_holder_is(core: Core) -> None:
    done = msg.Finished(trajectories=(given(core),))
    for stranger in (b"b", b"nobody"):
        assert [r.kind for r in refusals(core.handle(stranger, done, 1.0))] == ["group"]
    core.lost(b"a", 1.0)
    core.handle(b"b", msg.Want(limit=2, version=1), 1.0)
    assert core.groups[2].holder == b"b"
    effects = core.handle(b"a", done, 2.0)
    assert any(isinstance(e, do.AddTrajectories) for e in effects), "the last words of a lost generator are taken"
    effects = core.handle(b"b", done, 2.0)
    assert not refusals(effects), "the same from the new holder is late, not wrong"
    assert not any(isinstance(e, do.AddTrajectories) for e in effects)


def test_a_late_duplicate_is_acknowledged_and_a_group_that_never_was_is_not(core: Core) -> None:
    old = answer(msg.Permit(group=0, problem=0, split="train", samples=(0,), seed=5, temperature=1.0), 0, 0)
    assert not refusals(core.handle(b"a", msg.Finished(trajectories=(old,)), 1.0))
    assert [r.kind for r in refusals(core.handle(b"nobody", msg.Finished(trajectories=(old,)), 1.0))] == ["group"]


@pytest.mark.parametrize(
    ("peer", "message", "kind"),
    [
        (b"nobody", msg.Want(limit=1, version=0), "stranger"),
        (b"nobody", msg.Holds(version=0), "stranger"),
        (b"nobody", STATUS, "stranger"),
        (b"nobody", msg.Canary(name="x", version=0, digests=(), log_probs=()), "stranger"),
        (b"nobody", msg.NextBatch(step=1), "stranger"),
        (b"nobody", msg.Leave(name="a", reason="x"), "stranger"),
        (b"a", msg.Leave(name="a", reason="x", session=7), "stranger"),
        (b"a", msg.Want(limit=2, version=0, session=7), "stranger"),
        (b"a", msg.Gone(name="a", pid=1, reason="x"), "stranger"),
        (b"a", msg.Pulse(name="a", pid=1, role="generator", doing="x" * 1001, since_s=0.0), "number"),
        (b"a", msg.Pulse(name="a", pid=1, role="generator", doing="x", since_s=math.nan), "number"),
        (b"a", msg.NextBatch(step=0), "stranger"),
        (b"a", msg.Published(version=1), "stranger"),
        (b"a", msg.Checkpointed(version=1), "stranger"),
        (b"a", EVALUATE, "stranger"),
        (b"a", msg.FetchEvaluation(evaluation=0), "stranger"),
        (b"a", msg.Done(), "stranger"),
        (b"nobody", msg.Shutdown(reason="x"), "stranger"),
        (b"a", msg.Hello(role="trainer", name="a", pid=1), "second"),
        (b"a", msg.Hello(role="root", name="a", pid=1), "role"),
        (b"c", msg.Hello(role="generator", name="", pid=1), "number"),
        (b"c", msg.Hello(role="generator", name="x" * 201, pid=1), "number"),
        (b"a", msg.Stop(reason=""), "direction"),
        (b"a", msg.Permits(permits=()), "direction"),
        (b"a", msg.Want(limit=-1, version=1), "number"),
        (b"a", msg.Want(limit=9, version=1), "number"),
        (b"a", msg.Want(limit=4, version=2), "version"),
        (b"a", msg.Want(limit=4, version=-2), "version"),
        (b"a", msg.Holds(version=2), "version"),
        (b"a", msg.Holds(version=-1), "version"),
        (b"a", replace(STATUS, version=7), "version"),
        (b"a", replace(STATUS, busy_seconds=math.nan), "number"),
        (b"a", replace(STATUS, wall_seconds=math.inf), "number"),
        (b"a", replace(STATUS, tokens_generated=2**64 - 1), "number"),
        (b"a", replace(STATUS, running=-1), "number"),
        (b"a", replace(STATUS, limit=99), "number"),
        (b"a", msg.Canary(name="x", version=2**40, digests=(), log_probs=()), "version"),
        (TRAINER, msg.NextBatch(step=2), "step"),
        (TRAINER, msg.NextBatch(step=-1), "step"),
        (TRAINER, msg.Published(version=2), "version"),
        (TRAINER, msg.Checkpointed(version=2), "version"),
        (TRAINER, msg.Checkpointed(version=0), "version"),
        (TRAINER, msg.FetchEvaluation(evaluation=3), "number"),
        (TRAINER, replace(EVALUATE, version=2), "version"),
        (TRAINER, replace(EVALUATE, evaluation=2**63), "number"),
        (TRAINER, replace(EVALUATE, samples=0), "number"),
        (TRAINER, replace(EVALUATE, samples=2**62), "number"),
        (TRAINER, replace(EVALUATE, problems=(-1,)), "number"),
        (TRAINER, replace(EVALUATE, temperature=math.inf), "number"),
    ],
)
def test_a_message_that_cannot_be_is_refused_and_changes_nothing(
    core: Core, peer: bytes, message: msg.Message, kind: str
) -> None:
    before = state(core)
    assert [r.kind for r in refusals(core.handle(peer, message, 1.0))] == [kind]
    assert core.refusals.counts == {kind: 1}
    assert state(core) == before


def test_more_evaluations_than_can_be_meant_are_refused(core: Core) -> None:
    for number in range(MOST_EVALUATIONS + 3):
        core.handle(TRAINER, replace(EVALUATE, evaluation=number), 1.0)
    assert core.refusals.counts == {"crowd": 3}
    assert len(core.evaluations.asked) == MOST_EVALUATIONS


def test_refusals_are_counted_by_kind_with_a_few_examples_and_answered_within_a_budget(core: Core) -> None:
    effects: list[do.Effect] = []
    for number in range(5000):
        effects += core.handle(b"peer-%d" % number, msg.Holds(version=number), 1.0)
        effects += core.malformed(b"peer-%d" % number, WireError(f"text {number}" * 100, "bytes"), 1.0)
    examples = [e for e in effects if isinstance(e, do.RecordRefusal)]
    assert len(examples) == 2 * EXAMPLES
    assert all(len(e.reason) <= 200 for e in examples)
    assert len(refusals(effects)) == ANSWERS_AT_ONCE
    assert core.refusals.counts == {"stranger": 5000, "bytes": 5000}
    assert core.snapshot(1.0).refused == {"stranger": 5000, "bytes": 5000}
    assert core.snapshot(1.0).counters.messages_refused == 10000
    assert refusals(core.handle(TRAINER, msg.NextBatch(step=9), 1.0)), "the trainer is told whatever others sent"
    assert len(refusals(core.handle(b"x", msg.Holds(version=0), 2.0))) == 1, "the budget fills up again"


def test_what_a_sound_generator_may_be_told_is_part_of_the_closed_list() -> None:
    assert HARMLESS < REFUSALS
