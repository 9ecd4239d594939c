"""The trainer's side of a batch that comes in parts, in any order and more than once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from support_buffer import trajectory

from async_rl.trainer.canary_watch import CanaryWatch
from async_rl.trainer.inbox import Inbox
from async_rl.trajectory.codec import pack
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router

BLOBS = [pack(trajectory(0, sample, 0)) for sample in range(5)]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Router, Inbox]]:
    with Router(f"ipc://{tmp_path}/s") as router, Dealer(router.endpoint, "trainer") as dealer:
        dealer.send(msg.Query())
        assert router.receive(20) is not None  # it is connected
        yield router, Inbox(dealer, 20.0, cast(CanaryWatch, None))


def part(step: int, after: int, until: int) -> msg.Batch:
    counters = msg.BufferCounters(slots=after)
    return msg.Batch(step=step, blobs=tuple(BLOBS[after:until]), after=after, total=5, counters=counters)


def asked(router: Router) -> list[msg.Message]:
    found = []
    while (received := router.receive(0.2)) is not None:
        found.append(received[1])
    return found  # type: ignore[return-value]


def test_the_next_part_is_asked_for_until_the_batch_is_whole(ends: tuple[Router, Inbox]) -> None:
    router, inbox = ends
    for message in (part(3, 0, 2), part(3, 2, 4), part(3, 4, 5)):
        router.send(b"trainer", message)
    batch = inbox.receive_batch(3)
    assert [t.sample for t in batch.trajectories] == [0, 1, 2, 3, 4]
    assert asked(router) == [msg.NextBatch(step=3), msg.NextBatch(step=3, after=2), msg.NextBatch(step=3, after=4)]
    assert inbox.parts == {}


def test_parts_that_come_twice_or_too_late_are_not_kept(ends: tuple[Router, Inbox]) -> None:
    router, inbox = ends
    for message in (part(3, 0, 2), part(3, 0, 2), part(3, 4, 5), part(3, 2, 5), part(3, 2, 5), part(4, 0, 5)):
        router.send(b"trainer", message)
    assert [t.sample for t in inbox.receive_batch(3).trajectories] == [0, 1, 2, 3, 4]
    router.send(b"trainer", part(3, 0, 5))
    assert [t.sample for t in inbox.receive_batch(4).trajectories] == [0, 1, 2, 3, 4]
    assert inbox.batches == inbox.parts == {}
    assert msg.NextBatch(step=3, after=2) in asked(router)
