"""Finished trajectories are kept and sent again until they are acknowledged."""

from __future__ import annotations

import pytest
from support_buffer import trajectory

from async_rl.errors import RunFailed
from async_rl.generator.outbox import BufferDeadline, Outbox
from async_rl.stall_timer import StallTimer


def test_what_is_not_acknowledged_is_sent_again_after_growing_pauses() -> None:
    outbox = Outbox()
    for sample in (0, 1):
        outbox.put(trajectory(5, sample, 0))
    assert outbox.pairs == {(5, 0), (5, 1)}
    assert len(outbox.take(100.0)) == 2
    assert outbox.take(100.0) == ()
    outbox.acknowledge([(5, 1), (9, 9)])
    sent = [second for second in range(100, 160) if outbox.late(float(second))]
    assert sent == [103, 109, 121, 145]
    assert outbox.waited_s(160.0) == 60.0
    outbox.excuse(50.0)
    assert outbox.waited_s(160.0) == 10.0
    outbox.acknowledge([(5, 0)])
    assert (outbox.pairs, outbox.waited_s(160.0)) == (set(), 0.0)


def test_a_buffer_that_does_not_acknowledge_is_reported_and_then_given_up() -> None:
    outbox, events, silent = Outbox(), [], 0.5
    deadline = BufferDeadline("generator-1", 60.0, StallTimer(10.0), lambda: silent, events.append)
    outbox.put(trajectory(812, 3, 0))
    outbox.take(0.0)
    for second in range(60):
        deadline.check(outbox, float(second))
    assert [event.seconds for event in events] == [10.0, 20.0, 40.0]
    assert events[0].text == (
        "generator-1 waits 10 s for the buffer to acknowledge 1 trajectories, the first is sample 3 of group 812; "
        "last heard of the buffer 0.5 s ago"
    )
    with pytest.raises(RunFailed, match=r"generator-1 waited 60 s \(wire.timeout_s\) for the buffer to acknowledge 1"):
        deadline.check(outbox, 61.0)
    silent = 61.0
    with pytest.raises(RunFailed, match="generator-1 has heard nothing of the buffer for 61 s"):
        deadline.check(Outbox(), 0.0)
