"""A trainer without a model: the conversation of trainer/loop.py and trainer/inbox.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from async_rl.instruments.world.clock import Link, Process
from async_rl.instruments.world.times import Times
from async_rl.wire import messages as msg
from async_rl.wire.frames import HARMLESS

REPEAT_S = 3.0
POLL_S = 0.5
"""between two questions for an evaluation"""
Pause = float | Callable[[], bool]
"""seconds, or until this is so"""


class Surroundings(Protocol):
    """What a trainer does beside talking to the buffer."""

    def share_weights(self, version: int) -> None: ...

    def train(self, step: int, batch: msg.Batch) -> None: ...

    def save(self, version: int, evaluations: int) -> None: ...

    def verify(self, message: msg.Verify) -> msg.Verdict | None: ...

    def finish(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class SimulatedTrainer(Process):
    """One life of the trainer, from the weights of `version` on."""

    surroundings: Surroundings
    times: Times
    version: int
    steps: int
    save_every: int
    """steps between checkpoints; 0: none but the last"""
    evaluate_every: int
    """0: never"""
    evaluations: int
    """asked for so far"""
    repeats: bool
    """sends again what was not answered"""
    link: Link = field(init=False)
    unanswered: dict[type, msg.Message] = field(default_factory=dict)
    """newest message of each kind that the buffer must know"""
    batches: dict[int, msg.Batch] = field(default_factory=dict)
    results: dict[int, msg.EvaluationResult] = field(default_factory=dict)
    asked: int = -1
    """newest step whose batch was asked for"""
    pending: int | None = None
    """an evaluation beside training"""
    until: Callable[[], bool] | None = None
    """what is waited for"""
    since: float = 0.0
    """when that wait began"""
    waited_s: float = 0.0
    work: Iterator[Pause] = field(init=False)
    saved: int = 0

    def begin(self) -> None:
        self.saved = self.version
        self.work = self.run()
        if self.repeats:
            self.repeat()
        self.go_on()

    def run(self) -> Iterator[Pause]:
        """The whole training; it pauses where it waits."""
        yield self.times.start()
        self.send(msg.Hello(role="trainer", name="trainer", pid=self.pid))
        yield from self.publish()
        if self.evaluate_every:
            yield from self.evaluate()
        for step in range(self.version, self.steps):
            self.ask(step)
            yield partial(self.batches.__contains__, step)
            batch = self.batches.pop(step)
            if step + 1 < self.steps:
                self.ask(step + 1)
            yield self.times.train()
            self.surroundings.train(step, batch)
            self.version = step + 1
            yield from self.publish()
            yield from self.evaluate_beside()
            if self.save_every and self.version % self.save_every == 0 and self.version < self.steps:
                yield from self.checkpoint()
        if self.evaluate_every:
            yield from self.evaluate()
        yield from self.checkpoint()
        self.send(msg.Done())
        yield POLL_S
        self.surroundings.finish()

    def publish(self) -> Iterator[Pause]:
        self.surroundings.share_weights(self.version)
        yield self.times.publish()
        self.send(msg.Published(version=self.version))

    def checkpoint(self) -> Iterator[Pause]:
        if self.version == self.saved:
            return
        yield self.times.save()
        self.surroundings.save(self.version, self.evaluations)
        self.saved = self.version
        yield self.times.publish()
        self.send(msg.Checkpointed(version=self.version))

    def evaluate(self) -> Iterator[Pause]:
        """Wait for an evaluation."""
        number = self.ask_evaluation()
        while True:
            yield from self.fetch(number, waits=True)
            if self.results.pop(number).finished:
                return
            yield POLL_S

    def evaluate_beside(self) -> Iterator[Pause]:
        """Begin an evaluation that is due, or ask for the one that runs; training goes on."""
        if self.pending is not None:
            yield from self.fetch(self.pending, waits=False)
            if self.results.pop(self.pending).finished:
                self.pending = None
        elif self.evaluate_every and self.version % self.evaluate_every == 0 and self.version < self.steps:
            self.pending = self.ask_evaluation()

    def ask_evaluation(self) -> int:
        self.evaluations += 1
        number = self.evaluations - 1
        self.send(msg.Evaluate(evaluation=number, version=self.version, problems=(0, 1, 2), samples=1, temperature=0.0))
        return number

    def fetch(self, number: int, *, waits: bool) -> Iterator[Pause]:
        self.results.pop(number, None)
        self.send(msg.FetchEvaluation(evaluation=number, waits=waits))
        yield partial(self.results.__contains__, number)
        del self.unanswered[msg.FetchEvaluation]

    # ------------------------------------------------------------------ messages

    def send(self, message: msg.Message) -> None:
        self.unanswered[type(message)] = message
        self.link.send(message)

    def ask(self, step: int) -> None:
        if step > self.asked:
            self.asked = step
            self.send(msg.NextBatch(step=step))

    def repeat(self) -> None:
        """Send again whatever may have been lost."""
        if self.until is not None:
            for message in self.unanswered.values():
                self.link.send(message)
        self.after(REPEAT_S, self.repeat)

    def receive(self, message: msg.Message) -> None:
        match message:
            case msg.Batch(step=step):
                if step >= self.version and step not in self.batches:
                    self.batches[step] = message
                if isinstance(asked := self.unanswered.get(msg.NextBatch), msg.NextBatch) and asked.step == step:
                    del self.unanswered[msg.NextBatch]
            case msg.EvaluationResult(evaluation=number):
                self.results[number] = message
            case msg.Verify():
                if (verdict := self.surroundings.verify(message)) is not None:
                    self.link.send(verdict)  # not repeated: it is said of the next trajectory again
            case msg.Refused(what=what, kind=kind) if kind in HARMLESS or what == "FetchEvaluation":
                pass  # the Hello or the Evaluate before it was lost; both are sent again
            case msg.Refused() | msg.Stop():
                raise AssertionError(f"a sound trainer receives {message}")
        if self.until is not None and self.until():
            self.waited_s += self.clock.now - self.since
            self.go_on()

    def go_on(self) -> None:
        """Work up to the next pause."""
        self.until = None
        while self.alive:
            pause = next(self.work, None)
            if pause is None:
                return
            if isinstance(pause, float):
                if pause > 0:
                    self.after(pause, self.go_on)
                    return
            elif not pause():
                self.until, self.since = pause, self.clock.now
                return
