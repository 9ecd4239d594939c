"""What a trajectory's notes tell of rewards and of other numbers."""

from __future__ import annotations

import math

from async_rl.trajectory.parts import MOST_NOTES, notes_in, part_means, parts_in


def test_numbers_that_were_noted_are_apart_from_parts_of_the_reward() -> None:
    info = {"tool_calls": 2.0, "reward/format": 1.0, "level": "hard", "broken": math.nan, "agent/requests": 3.0}
    assert notes_in(info) == {"tool_calls": 2.0, "agent/requests": 3.0}
    assert parts_in(info) == {"format": 1.0}
    assert parts_in({"reward/a": 1e300, "reward/b": math.inf}) == notes_in({"a": 1e300, "b": -math.inf}) == {}
    assert notes_in({}) == {}


def test_a_task_that_notes_many_numbers_does_not_fill_the_metrics() -> None:
    assert len(notes_in({f"n{i}": 1.0 for i in range(1000)})) == MOST_NOTES


def test_means_are_over_those_that_have_the_number() -> None:
    assert part_means([{"a": 1.0, "b": 0.0}, {"b": 1.0}, {}]) == {"a": 1.0, "b": 0.5}
