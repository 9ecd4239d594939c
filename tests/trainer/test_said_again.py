"""The trainer says again what may have got lost, and waits no longer than it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from async_rl.errors import RunFailed
from async_rl.trainer import inbox as inbox_module
from async_rl.trainer.inbox import Inbox
from async_rl.wire import messages as msg
from async_rl.wire.channel import WireTimeout


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Buffer:
    """A dealer whose other end answers by `answer(message, how often it was said)`; waiting takes the clock on."""

    clock: Clock
    answer: Callable[[msg.Message, int], list[msg.Message]]
    said: list[msg.Message] = field(default_factory=list)
    queue: list[msg.Message] = field(default_factory=list)
    stopped_s: float = 0.0
    """how long the process is stopped in the next wait"""

    def send(self, message: msg.Message) -> None:
        self.said.append(message)
        self.queue += self.answer(message, self.said.count(message))

    def receive(self, seconds: float, waiting_for: str) -> msg.Message:
        if self.queue:
            self.clock.now += 0.1
            return self.queue.pop(0)
        self.clock.now += seconds + self.stopped_s
        self.stopped_s = 0.0
        raise WireTimeout(waiting_for)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Inbox, Buffer]]:
    def build(answer: Callable[[msg.Message, int], list[msg.Message]]) -> tuple[Inbox, Buffer]:
        clock = Clock()
        monkeypatch.setattr(inbox_module, "time", clock)
        buffer = Buffer(clock, answer)
        return Inbox(buffer, 60.0, canary=None), buffer  # type: ignore[arg-type]

    return build


def batch(step: int) -> msg.Batch:
    return msg.Batch(step=step)


def test_a_trainer_repeats_everything_the_buffer_must_know_until_its_batch_comes(make: Any) -> None:
    def answer(message: msg.Message, times: int) -> list[msg.Message]:
        return [batch(3)] if message == msg.NextBatch(step=3) and times == 4 else []

    inbox, buffer = make(answer)
    inbox.send(msg.Hello(role="trainer", name="trainer", pid=1))
    inbox.send(msg.Published(version=3))
    assert inbox.receive_batch(3).step == 3
    assert buffer.said.count(msg.Published(version=3)) == 4
    assert buffer.said[-3:] == [buffer.said[0], msg.Published(version=3), msg.NextBatch(step=3)]
    assert 8 < buffer.clock.now < 12
    inbox._handle(batch(3))
    assert inbox.batches == {}, "a batch that comes twice is not kept"


def test_a_refusal_that_comes_of_a_lost_word_is_no_failure(make: Any) -> None:
    ask = msg.Evaluate(evaluation=0, version=0, problems=(1,), samples=1, temperature=0.0)

    def answer(message: msg.Message, times: int) -> list[msg.Message]:
        if isinstance(message, msg.FetchEvaluation) and times == 1:
            return [msg.Refused(what="FetchEvaluation", reason="no such evaluation was asked for", kind="number")]
        if isinstance(message, msg.FetchEvaluation):
            return [msg.EvaluationResult(evaluation=0, finished=True, rewards=(1.0,))]
        return []

    inbox, buffer = make(answer)
    inbox.send(ask)
    result = inbox.evaluation(0, wait=True)
    assert result is not None
    assert result.rewards == (1.0,)
    assert buffer.said.count(ask) == 2
    assert inbox.unconfirmed == {}
    with pytest.raises(RunFailed, match="the buffer refused NextBatch: the next batch is that of step 2"):
        inbox._handle(msg.Refused(what="NextBatch", reason="the next batch is that of step 2", kind="step"))


def test_a_wait_without_progress_ends_and_one_with_progress_does_not(make: Any) -> None:
    progress = [0]

    def answer(message: msg.Message, times: int) -> list[msg.Message]:
        if not isinstance(message, msg.NextBatch):
            return []
        progress[0] += times < 100
        word = "0 of 4 groups finished; oldest is group 8 on generator-1"
        return [msg.Waiting(what="batch", reason=word, seconds=1.0, progress=progress[0])]

    inbox, buffer = make(answer)
    with pytest.raises(RunFailed) as failure:
        inbox.receive_batch(0)
    assert str(failure.value) == (
        "waited 60 s (wire.timeout_s) for the batch of step 0; last heard: 0 of 4 groups finished; oldest is group 8 "
        "on generator-1"
    )
    assert buffer.clock.now > 100 * 3, "as long as something moved it waited"


def test_time_in_which_the_trainer_itself_was_stopped_is_no_waiting(make: Any) -> None:
    def answer(message: msg.Message, times: int) -> list[msg.Message]:
        return [batch(0)] if isinstance(message, msg.NextBatch) and times == 3 else []

    inbox, buffer = make(answer)
    buffer.stopped_s = 1000.0
    assert inbox.receive_batch(0).step == 0
    assert buffer.clock.now > 1000


def test_the_end_waits_until_the_last_checkpoint_is_noted(make: Any) -> None:
    def answer(message: msg.Message, times: int) -> list[msg.Message]:
        noted = 8 if buffer.said.count(msg.Checkpointed(version=8)) >= 2 else 4
        snapshot = msg.Snapshot(consumed=noted, counters=msg.BufferCounters(groups_trained=8))
        return [snapshot] if message == msg.Query() else []

    inbox, buffer = make(answer)
    inbox.send(msg.Checkpointed(version=8))
    assert inbox.consumed(8).groups_trained == 8
