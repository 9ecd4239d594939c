"""Failed episodes are counted by reason, also across a restart; parts of held-out rewards are averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_buffer import TRAINER, answer, make_core, trajectory

from async_rl.buffer import effects as do
from async_rl.buffer.failures import MOST_REASONS, OTHERS, Failures, most_frequent, sentence
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.staleness import PacePolicy
from async_rl.buffer.store import Store
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=1, max_staleness=0, pipeline_depth=1.0, window=1)


def test_reasons_that_differ_in_their_numbers_are_one_and_the_first_is_told() -> None:
    found = Failures()
    for reason in ("took more than 3.5 s\nin a.py:7", "took more than 12 s in a.py:9", "KeyError: 'gold'", ""):
        found.add(reason)
    assert found.told() == {
        "took more than 3.5 s in a.py:7": 2,
        "KeyError: 'gold'": 1,
        "no reason was given": 1,
    }
    assert sentence(found.told()).startswith("2 x took more than 3.5 s in a.py:7; 1 x KeyError: 'gold'; ")
    assert found.last == "no reason was given"


def test_a_task_with_a_new_reason_each_time_fills_no_memory() -> None:
    found = Failures()
    for number in range(200):
        found.add("x" * number)
    assert len(found.counts) == MOST_REASONS + 1
    assert sum(found.counts.values()) == 200
    assert found.told()[OTHERS] == 200 - 5
    assert most_frequent([("a", 1), (OTHERS, 9), ("b", 2)], 2) == {"b": 2, "a": 1, OTHERS: 9}


def test_the_buffer_tells_how_many_arrived_and_why_some_failed_and_remembers_it(tmp_path: Path) -> None:
    core = make_core(PACE, group_size=3)
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    made = (
        trajectory(0, 0, 0),
        trajectory(0, 1, 0, ended="error", reason="KeyError: 'gold'"),
        trajectory(0, 2, 0, ended="error", reason="KeyError: 'silver'"),
    )
    core.handle(b"g", msg.Finished(trajectories=made), 0.0)
    told = core.counters()
    assert (told.trajectories_arrived, told.trajectories_failed) == (3, 2)
    assert told.failures == {"KeyError: 'gold'": 1, "KeyError: 'silver'": 1}
    assert told.last_failure == "KeyError: 'silver'"

    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        store.add_group(group=0, problem=0, split="train", admitted_version=0, admitted_at=0.0, generator="g")
        store.add_trajectories(made)
        store.commit()
        again = make_core(PACE, group_size=3)
        restore(again, read_state(store), version=0)
    after = again.counters()
    assert (after.trajectories_arrived, after.trajectories_failed, after.failures) == (3, 2, told.failures)


def test_parts_of_held_out_rewards_are_means_over_those_that_have_them() -> None:
    core = make_core(PACE)
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(TRAINER, msg.Evaluate(evaluation=0, version=0, problems=(5,), samples=3, temperature=0.0), 0.0)
    effects = core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    permit = next(e.message.permits for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits))[
        0
    ]
    assert permit.size == 3
    for sample, changes in enumerate(
        (
            {"info": {"reward/format": 1.0, "reward/correct": 0.0, "tool_calls": 3.0}},
            {"info": {"reward/correct": 1.0}},
            {"info": {"reward/format": 0.5}, "ended": "error", "reason": "x"},
        )
    ):
        core.handle(b"g", msg.Finished(trajectories=(answer(permit, sample, 0, **changes),)), 0.0)
    _, told = core.handle(TRAINER, msg.FetchEvaluation(evaluation=0), 2.0)
    assert isinstance(told, do.Send)
    assert isinstance(told.message, msg.EvaluationResult)
    assert told.message.parts == pytest.approx({"format": 1.0, "correct": 0.5})


def test_a_permit_for_the_rest_of_a_group_says_how_large_the_group_is() -> None:
    core = make_core(PACE, group_size=3)
    for peer in (b"g", b"h"):
        core.handle(peer, msg.Hello(role="generator", name=peer.decode(), pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    core.handle(b"g", msg.Finished(trajectories=(trajectory(0, 1, 0),)), 0.0)
    core.handle(b"h", msg.Want(limit=9, version=0), 0.0)
    effects = core.lost(b"g", 1.0)
    permits = next(e.message.permits for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits))
    assert [(p.group, p.samples, p.size) for p in permits] == [(0, (0, 2), 3)]
