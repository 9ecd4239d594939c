"""A trainer without a model: the conversation of trainer/loop.py and trainer/inbox.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from support_sim_clock import Link, Process

from async_rl.wire import messages as msg
from async_rl.wire.frames import HARMLESS

AGAIN_S = 3.0
Wait = float | Callable[[], bool]
"""seconds, or until this is so"""


class Surroundings(Protocol):
    """What the trainer does beside talking."""

    def share_weights(self, version: int) -> None: ...

    def train(self, step: int, batch: msg.Batch) -> None: ...

    def save(self, version: int, evaluations: int) -> None: ...

    def finish(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class Trainer(Process):
    """One life, from the weights of `version` on."""

    run: Surroundings
    version: int
    steps: int
    every: int
    """steps between checkpoints"""
    evaluate_every: int
    """0: never"""
    evaluations: int
    """asked for so far"""
    step_s: float
    link: Link = field(init=False)
    said: dict[type, msg.Message] = field(default_factory=dict)
    batches: dict[int, msg.Batch] = field(default_factory=dict)
    results: dict[int, msg.EvaluationResult] = field(default_factory=dict)
    asked: int = -1
    pending: int | None = None
    """an evaluation beside training"""
    until: Callable[[], bool] | None = None
    story: Iterator[Wait] = field(init=False)
    saved: int = 0

    def begin(self) -> None:
        self.saved = self.version
        self.story = self.tell()
        self.again()
        self.go_on()

    def tell(self) -> Iterator[Wait]:
        """Everything a run's training consists of."""
        yield self.clock.about(0.5)
        self.say(msg.Hello(role="trainer", name="trainer", pid=self.pid))
        yield from self.publish()
        if self.evaluate_every:
            yield from self.evaluate()
        for step in range(self.version, self.steps):
            self.ask(step)
            yield lambda step=step: step in self.batches
            batch = self.batches.pop(step)
            if step + 1 < self.steps:
                self.ask(step + 1)
            yield self.clock.about(self.step_s)
            self.run.train(step, batch)
            self.version = step + 1
            yield from self.publish()
            yield from self.watch()
            if self.version % self.every == 0 and self.version < self.steps:
                yield from self.checkpoint()
        if self.evaluate_every:
            yield from self.evaluate()
        yield from self.checkpoint()
        self.say(msg.Done())
        yield 0.5
        self.run.finish()

    def publish(self) -> Iterator[Wait]:
        self.run.share_weights(self.version)
        yield self.clock.about(0.02)
        self.say(msg.Published(version=self.version))

    def checkpoint(self) -> Iterator[Wait]:
        if self.version == self.saved:
            return
        yield self.clock.about(0.1)
        self.run.save(self.version, self.evaluations)
        self.saved = self.version
        yield self.clock.about(0.02)
        self.say(msg.Checkpointed(version=self.version))

    def evaluate(self) -> Iterator[Wait]:
        number = self.ask_evaluation()
        while True:
            yield from self.fetch(number)
            if self.results.pop(number).finished:
                return
            yield 0.5

    def watch(self) -> Iterator[Wait]:
        """An evaluation beside training: nobody waits for it."""
        if self.pending is not None:
            yield from self.fetch(self.pending)
            if self.results.pop(self.pending).finished:
                self.pending = None
        elif self.evaluate_every and self.version % self.evaluate_every == 0 and self.version < self.steps:
            self.pending = self.ask_evaluation()

    def ask_evaluation(self) -> int:
        self.evaluations += 1
        number = self.evaluations - 1
        self.say(msg.Evaluate(evaluation=number, version=self.version, problems=(0, 1, 2), samples=1, temperature=0.0))
        return number

    def fetch(self, number: int) -> Iterator[Wait]:
        self.results.pop(number, None)
        self.say(msg.FetchEvaluation(evaluation=number))
        yield lambda: number in self.results
        del self.said[msg.FetchEvaluation]

    # ----------------------------------------------------------------- talking

    def say(self, message: msg.Message) -> None:
        self.said[type(message)] = message
        self.link.send(message)

    def ask(self, step: int) -> None:
        if step > self.asked:
            self.asked = step
            self.say(msg.NextBatch(step=step))

    def again(self) -> None:
        """Whatever of it was lost."""
        if self.until is not None:
            for message in self.said.values():
                self.link.send(message)
        self.after(AGAIN_S, self.again)

    def hear(self, message: msg.Message) -> None:
        match message:
            case msg.Batch(step=step):
                if step >= self.version and step not in self.batches:
                    self.batches[step] = message
                if isinstance(asked := self.said.get(msg.NextBatch), msg.NextBatch) and asked.step == step:
                    del self.said[msg.NextBatch]
            case msg.EvaluationResult(evaluation=number):
                self.results[number] = message
            case msg.Refused(what=what, kind=kind) if kind in HARMLESS or what == "FetchEvaluation":
                pass  # the Hello or the Evaluate before it was lost; they are said again
            case msg.Refused() | msg.Stop():
                raise AssertionError(f"a sound trainer hears {message}")
        if self.until is not None and self.until():
            self.go_on()

    def go_on(self) -> None:
        """To the next wait."""
        self.until = None
        while self.alive:
            wait = next(self.story, None)
            if wait is None:
                return
            if isinstance(wait, float):
                self.after(wait, self.go_on)
                return
            if not wait():
                self.until = wait
                return
