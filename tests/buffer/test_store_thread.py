"""The store in a thread beside the rule: order, nothing answered before it is stored, errors, a store that holds up."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Sequence

import pytest
from support_buffer import trajectory

from async_rl.buffer import effects as do
from async_rl.buffer.recent import Recent
from async_rl.buffer.store_thread import SMALL_BYTES, Sender, StoreThread
from async_rl.errors import RunFailed
from async_rl.trajectory.codec import pack
from async_rl.wire import messages as msg

LONG_S = 60.0
COUNTERS = msg.BufferCounters()


class Disk:
    """Stores what it is given, and waits where it is told to."""

    def __init__(self) -> None:
        self.stored: list[do.Effect] = []
        self.by: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None

    def carry_out(self, effects: Sequence[do.Effect], sender: Sender) -> None:
        assert self.may_go_on.wait(LONG_S)
        self.by.append(threading.get_ident())
        self.stored += [effect for effect in effects if not isinstance(effect, do.Send)]
        for effect in effects:
            if isinstance(effect, do.Send):
                sender.send(effect.peer, effect.message)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def thread(disk: Disk) -> Iterator[StoreThread]:
    with StoreThread(disk.carry_out) as made:
        yield made
        disk.may_go_on.set()


def answer(number: int) -> do.Send:
    return do.Send(peer=b"g", message=msg.NewWeights(version=number))


def batch(step: int) -> do.SendBatch:
    return do.SendBatch(peer=b"t", step=step, counters=COUNTERS)


def answered(thread: StoreThread) -> list[int]:
    return [message.version for _, message, _ in thread.answers() if isinstance(message, msg.NewWeights)]


def test_a_small_round_is_carried_out_at_once(disk: Disk, thread: StoreThread) -> None:
    thread.put([answer(1)])
    assert answered(thread) == [1]
    assert disk.by == [threading.get_ident()]


def test_rounds_are_carried_out_in_their_order_also_small_ones_behind_large_ones(
    disk: Disk, thread: StoreThread
) -> None:
    disk.may_go_on.clear()
    for number in range(20):
        thread.put([batch(number), answer(number)] if number % 2 == 0 else [answer(number)])
    assert answered(thread) == [], "nothing is answered before it is stored"
    disk.may_go_on.set()
    thread.finish()
    assert answered(thread) == list(range(20))
    assert [effect.step for effect in disk.stored if isinstance(effect, do.SendBatch)] == list(range(0, 20, 2))
    assert threading.get_ident() not in disk.by


def test_the_socket_is_woken_for_an_answer(disk: Disk, thread: StoreThread) -> None:
    for number in range(3):
        thread.put([batch(number), answer(number)])
        assert select.select([thread.fileno()], [], [], LONG_S)[0]
        thread.finish()
        assert answered(thread) == [number]
        assert not select.select([thread.fileno()], [], [], 0)[0]


def test_what_waits_is_counted_in_bytes(disk: Disk, thread: StoreThread) -> None:
    one = trajectory(0, 0, 0)
    large = [one] * (1 + SMALL_BYTES // len(pack(one)))
    disk.may_go_on.clear()
    thread.put([do.AddTrajectories(trajectories=large, blobs=[pack(t) for t in large])])
    assert thread.waiting_bytes >= SMALL_BYTES
    disk.may_go_on.set()
    thread.finish()
    assert thread.waiting_bytes == 0


def test_what_a_round_fails_with_ends_the_thread_of_the_socket_behind_its_answers(
    disk: Disk, thread: StoreThread
) -> None:
    disk.failure = RunFailed("the disk is full")
    thread.put([batch(0), answer(1)])
    with pytest.raises(RunFailed, match="disk is full"):
        thread.finish()
    assert answered(thread) == [1]
    with pytest.raises(RunFailed, match="disk is full"):
        thread.put([answer(2)])
    assert answered(thread) == []


def test_a_store_that_is_held_up_shows(disk: Disk, thread: StoreThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.buffer.store_thread.STUCK_S", -1.0)
    assert not thread.stuck
    disk.may_go_on.clear()
    thread.put([batch(0)])
    assert thread.stuck
    disk.may_go_on.set()
    thread.finish()
    assert not thread.stuck


def test_recent_groups_are_whole_or_not_there() -> None:
    recent = Recent(most_bytes=100, newest=4)
    for group in (4, 5, 6, 7):
        recent.begin(group)
    recent.add(4, 0, b"of an earlier launch")
    for group in (5, 6):
        for sample in (1, 0):
            recent.add(group, sample, bytes(20))
    recent.add(7, 0, bytes(10))
    recent.add(7, 1, bytes(20))  # does not fit: all of it goes
    recent.add(7, 2, bytes(1))
    assert recent.payloads(4) is None
    assert recent.payloads(7) is None
    assert recent.payloads(5) == [(0, bytes(20)), (1, bytes(20))]
    recent.form([5])
    recent.add(5, 2, b"too late for its batch")
    assert recent.payloads(5) == [(0, bytes(20)), (1, bytes(20))]
    recent.drop(5)
    recent.begin(5)
    assert recent.payloads(5) is None
    assert recent.num_bytes == 40
