"""Long waits are reported with who, for what, since when and the last thing heard; on a virtual clock."""

from __future__ import annotations

from typing import Any

import pytest
from support_buffer import TRAINER, answer, make_core

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=1.0, window=1)


@pytest.fixture
def core() -> Core:
    """A generator with two groups of two samples."""
    core = make_core(PACE, frozen_after_s=1e6, stall_report_s=10.0)
    core.handle(b"generator-1", msg.Hello(role="generator", name="generator-1", pid=1), 0.0)
    core.handle(b"generator-1", msg.Want(limit=4, version=0), 0.0)
    return core


def finish(core: Core, group: int, now: float, version: int = 0) -> None:
    done = tuple(answer(core.groups[group].permit_missing(), sample, version) for sample in core.groups[group].missing)
    core.handle(b"generator-1", msg.Finished(trajectories=done), now)


def until(core: Core, since: float, end: float) -> list[tuple[float, str, Any]]:
    """(time, event, detail) of what is reported."""
    found = []
    for quarter in range(int(4 * since) + 1, int(4 * end) + 1):
        effects = core.tick(quarter / 4)
        found += [(quarter / 4, e.event.event, e.event.detail()) for e in effects if isinstance(e, do.Note)]
    return found


def test_a_trainer_that_waits_long_for_a_batch_is_reported_at_growing_intervals_and_when_it_goes_on(
    core: Core,
) -> None:
    core.handle(b"generator-1", msg.Finished(trajectories=(answer(core.groups[0].permit_missing(), 0, 0),)), 1.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 2.0)
    doing = "in tasks or rewards of 3 episodes; held up for 9.0 s in my_rewards.py:31 judge"
    beat = msg.Pulse(name="generator-1", pid=1, role="generator", doing=doing, since_s=9.0)
    core.handle(b"generator-1/pulse", beat, 11.75)
    (reported,) = until(core, 2, 20)
    at, event, detail = reported
    assert (at, event) == (12.0, "stall")
    assert (detail["waits"], detail["for"], detail["seconds"]) == ("trainer", "the batch of step 0", 10.0)
    assert detail["text"] == (
        "trainer waits 10 s for the batch of step 0: 0 of 2 groups finished; oldest is group 0 on generator-1, 12.0 s, "
        "1/2 samples; last heard of generator-1 0.2 s ago: in tasks or rewards of 3 episodes; held up for 9.0 s in "
        "my_rewards.py:31 judge (for 9.2 s)"
    )
    assert [(at, event) for at, event, _ in until(core, 20, 70)] == [(22.0, "stall"), (42.0, "stall")]
    finish(core, 0, 70.0)
    finish(core, 1, 70.0)
    over = [(event, detail) for _, event, detail in until(core, 70, 71)]
    assert over == [("stall_over", {"waits": "trainer", "for": "the batch of step 0", "seconds": 68.25})]


def test_where_steps_take_a_minute_a_wait_of_a_minute_is_no_news(core: Core) -> None:
    for step, now in enumerate((0.0, 60.0)):
        for group in list(core.groups):
            finish(core, group, now, version=step)
        core.handle(TRAINER, msg.NextBatch(step=step), now)
        core.handle(TRAINER, msg.Published(version=step + 1), now + 60)
        core.handle(b"generator-1", msg.Want(limit=4, version=step + 1), now + 60)
    core.handle(TRAINER, msg.NextBatch(step=2), 120.0)
    found = [(at, event) for at, event, detail in until(core, 120, 500) if detail["waits"] == "trainer"]
    assert found == [(240.0, "stall"), (360.0, "stall")]


def test_generators_that_wait_for_a_slow_trainer_name_it_and_what_it_does(core: Core) -> None:
    finish(core, 0, 1.0)
    finish(core, 1, 1.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 1.0)
    beat = msg.Pulse(name="trainer", pid=1, role="trainer", doing="training step 0", since_s=9.0)
    core.handle(TRAINER + b"/pulse", beat, 12.0)
    (reported,) = until(core, 2, 20)
    at, _, detail = reported
    assert at == 12.25
    assert detail["text"] == (
        "generator-1 waits 10 s for permits: 2 of 2 slots are in use; the trainer has published version 0 and 0 "
        "finished groups wait for it; last heard of trainer 0.2 s ago: training step 0 (for 9.2 s)"
    )
    assert core.snapshot(20.0).waits == (
        msg.StandingWait(
            who="generator-1",
            what="permits",
            seconds=17.75,
            why=detail["text"].partition(": ")[2].replace("0.2 s ago", "8.0 s ago").replace("9.2", "17.0"),
        ),
    )


def test_a_wait_for_an_evaluation_is_reported_and_one_that_nobody_waits_for_is_not(core: Core) -> None:
    ask = msg.Evaluate(evaluation=3, version=0, problems=(5,), samples=2, temperature=1.0)
    core.handle(TRAINER, ask, 0.0)
    core.handle(TRAINER, msg.FetchEvaluation(evaluation=3), 0.0)
    assert [event for _, event, _ in until(core, 0, 30)] == []
    found = []
    for second in range(30, 45):
        core.handle(TRAINER, msg.FetchEvaluation(evaluation=3, waits=True), float(second))
        found += until(core, second, second + 1)
    ((at, _, detail),) = found
    assert at == 40.0
    assert detail["text"].startswith(
        "trainer waits 10 s for evaluation 3: 2 of its episodes are missing; oldest is group 2 on generator-1, 40.0 s, "
        "0/2 samples; last heard of generator-1 40.0 s ago: "
    )


def test_an_evaluation_that_is_done_while_the_trainer_does_not_look_is_no_riddle(core: Core) -> None:
    core.handle(TRAINER, msg.Evaluate(evaluation=3, version=0, problems=(5,), samples=2, temperature=1.0), 0.0)
    core.handle(TRAINER, msg.FetchEvaluation(evaluation=3, waits=True), 0.0)
    core.handle(b"generator-1", msg.Want(limit=8, version=0), 0.0)
    (group,) = (group for _, group in core.evaluations.groups.values())
    done = tuple(answer(group.permit_missing(), sample, 0) for sample in sorted(group.missing))
    core.handle(b"generator-1", msg.Finished(trajectories=done), 1.0)
    (row,) = (row for row in core.waits.rows(2.0) if row.what == "evaluation 3")
    assert row.why == "all of its episodes are there"
