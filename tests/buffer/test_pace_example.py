"""The worked example in the docstring of PacePolicy, replayed row by row."""

from __future__ import annotations

import re

from async_rl.buffer.staleness import PacePolicy, Slot, SlotQueue

ROW = re.compile(r"^ {8}(\w.*?) {2,}(\d+) +v(\d+) +(\d+) +(\d+) +(\d+)  (.+)$", re.MULTILINE)


def test_the_worked_example_of_pace_says_what_the_policy_answers() -> None:
    rows = ROW.findall(PacePolicy.__doc__ or "")
    assert len(rows) == 8
    pace = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=2)
    assert pace.slots == 3
    queue, names, step, admissions = SlotQueue(), "ABCDE", 0, 0
    for what, *numbers, answer in rows:
        if what.startswith("A and C finish"):
            for group in (0, 2):
                queue.finish(group, deadline=1)
            assert pace.select(queue, step=step) == [0, 2]
            queue.train([0, 2])
            step += 1
        said_step, version, live, used, latest = map(int, numbers)
        assert (said_step, live) == (step, queue.live), what
        assert used == pace.used(queue, step=step, version=version, published=step), what
        assert latest == pace.latest_step(ahead=queue.live, step=step), what
        admitted = pace.admit(queue, step=step, version=version, published=step)
        assert admitted == (not answer.startswith("no: ")), what
        if admitted:
            assert answer == names[admissions]
            queue.add(Slot(group=admissions, deadline=0))
            admissions += 1
    assert admissions == len(names)


def test_a_group_two_places_behind_a_running_one_is_outside_a_window_of_two() -> None:
    pace = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=2)
    queue = SlotQueue()
    for group in range(3):
        queue.add(Slot(group=group, deadline=1))
    queue.finish(1, deadline=1)
    queue.finish(2, deadline=1)
    assert pace.select(queue, step=0) is None
    assert pace.held_up_by(queue, step=0) == [0]
