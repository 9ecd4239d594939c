"""The trainer's side of the conversation with the buffer: ask ahead, wait by name, never for ever."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from async_rl.errors import RunFailed
from async_rl.trainer.canary import CanaryWatch
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import WireError
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout

POLL_EVALUATION_S = 0.05


@dataclass(slots=True)
class Inbox:
    """Answers come in any order: a batch asked for ahead may arrive while an evaluation is awaited."""

    dealer: Dealer
    timeout_s: float
    """longest silence about what is waited for"""
    canary: CanaryWatch
    """compares what generators show of their weights, wherever it arrives"""
    batches: dict[int, msg.Batch] = field(default_factory=dict)
    """whole ones, of the step waited for and those asked for ahead"""
    parts: dict[int, list[Trajectory]] = field(default_factory=dict)
    """what has come of batches that are larger than one message"""
    wanted: int = 0
    """step of the next batch that will be taken"""
    evaluations: dict[int, msg.EvaluationResult] = field(default_factory=dict)
    snapshots: list[msg.Snapshot] = field(default_factory=list)
    asked: int = -1
    """newest step whose batch was asked for"""
    last_word: str = ""
    """what the buffer last said about a wait"""

    def ask_batch(self, step: int) -> None:
        """Ask for the batch of `step`, ahead of need."""
        if step > self.asked:
            self.asked = step
            self.dealer.send(msg.NextBatch(step=step))

    def batch(self, step: int) -> msg.Batch:
        """Wait for the batch of `step`. Raises RunFailed naming who was waited for."""
        self.ask_batch(step)
        deadline = time.monotonic() + self.timeout_s
        while step not in self.batches:
            before = self.last_word, len(self.parts.get(step, ()))
            self._receive(deadline, f"the batch of step {step}")
            if (self.last_word, len(self.parts.get(step, ()))) != before:  # something moved: slow is not hung
                deadline = time.monotonic() + self.timeout_s
        self.last_word = ""
        self.wanted = step + 1
        return self.batches.pop(step)

    def evaluation(self, number: int, *, wait: bool) -> msg.EvaluationResult | None:
        """The result of an evaluation asked for before; None when it is not complete and `wait` is off.

        Raises RunFailed when no trajectory of it has come for `timeout_s`."""
        deadline, missing = 0.0, math.inf
        while True:
            self.evaluations.pop(number, None)
            self.dealer.send(msg.FetchEvaluation(evaluation=number))
            answered_by = time.monotonic() + self.timeout_s
            while number not in self.evaluations:
                self._receive(answered_by, f"the buffer's word on evaluation {number}")
            result = self.evaluations.pop(number)
            if result.finished or not wait:
                return result if result.finished else None
            if result.detail["missing"] < missing:  # something moved: a slow evaluation is not a hang
                deadline, missing = time.monotonic() + self.timeout_s, result.detail["missing"]
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"waited {self.timeout_s:g} s (wire.timeout_s) for another trajectory of evaluation "
                    f"{number}, {missing:.0f} are missing; a reward or tool function that blocks stops its generator"
                )
            time.sleep(POLL_EVALUATION_S)

    def snapshot(self) -> dict[str, float]:
        """The buffer's counters now."""
        self.snapshots.clear()
        self.dealer.send(msg.Query())
        deadline = time.monotonic() + self.timeout_s
        while not self.snapshots:
            self._receive(deadline, "the buffer's counters")
        detail = self.snapshots.pop().detail
        return {name: float(value) for name, value in detail.items() if isinstance(value, int | float)}

    def listen(self) -> None:
        """Take in what has arrived, without waiting."""
        while True:
            try:
                message = self.dealer.receive(0.0, "anything")
            except WireTimeout:
                return
            except WireError as error:
                raise RunFailed(f"the trainer cannot read what the buffer sends: {error}") from None
            self._take(message)

    def _receive(self, deadline: float, waiting_for: str) -> None:
        try:
            message = self.dealer.receive(max(0.0, deadline - time.monotonic()), waiting_for)
        except WireTimeout:
            last = f"; last heard: {self.last_word}" if self.last_word else ""
            raise RunFailed(
                f"waited {self.timeout_s:g} s (wire.timeout_s) for {waiting_for}{last}"
            ) from None
        except WireError as error:
            raise RunFailed(f"the trainer cannot read what the buffer sends: {error}") from None
        self._take(message)

    def _take(self, message: msg.Message) -> None:
        match message:
            case msg.Batch():
                self._take_batch(message)
            case msg.EvaluationResult(evaluation=evaluation):
                self.evaluations[evaluation] = message
            case msg.Snapshot():
                self.snapshots.append(message)
            case msg.Canary():
                self.canary.hear(message)
            case msg.Waiting(reason=reason):
                self.last_word = _without_seconds(reason)
            case msg.Refused(what=what, reason=reason):
                raise RunFailed(f"the buffer refused {what}: {reason}")
            case msg.Stop(reason=reason):
                raise RunFailed(f"the buffer stopped: {reason}")
            case _:
                pass


    def _take_batch(self, part: msg.Batch) -> None:
        """Put a batch together; ask for what is missing. What was taken before is not kept again."""
        step = part.step
        if step < self.wanted or step in self.batches:
            return
        have = self.parts.setdefault(step, [])
        if part.after == len(have):
            have += part.trajectories
        if len(have) < part.total:
            self.dealer.send(msg.NextBatch(step=step, after=len(have)))
            return
        self.batches[step] = replace(part, trajectories=tuple(self.parts.pop(step)), after=0)


def _without_seconds(reason: str) -> str:
    """The reason without the running clock, so that an unchanged situation reads the same."""
    return ", ".join(part for part in reason.split(", ") if not part.endswith(" s"))


