"""A virtual clock, processes that die and freeze, and connections that delay, break and lose what is under way."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from async_rl.wire import messages as msg

Action = Callable[[], None]


@dataclass(eq=False)
class Clock:
    """Everything that happens, in the order of its time. The same seed gives the same story."""

    random: Random
    now: float = 0.0
    """seconds"""
    delay: float = 0.02
    """mean of a message on its way, seconds"""
    events: list[tuple[float, int, Action]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)
    happened: int = 0

    def at(self, delay: float, action: Action) -> None:
        heapq.heappush(self.events, (self.now + delay, next(self.count), action))

    def about(self, mean: float) -> float:
        """A random time, seconds."""
        return self.random.expovariate(1 / mean)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def step(self) -> None:
        self.now, _, action = heapq.heappop(self.events)
        self.happened += 1
        action()


@dataclass(eq=False, kw_only=True)
class Process:
    """Does nothing when it is dead, and nothing yet while it is frozen."""

    clock: Clock
    name: str
    pid: int = 0
    alive: bool = True
    frozen_until: float = 0.0

    def after(self, delay: float, action: Action) -> None:
        self.clock.at(delay, lambda: self._awake(action))

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.clock.now + seconds)

    def die(self) -> None:
        self.alive = False

    def hear(self, message: msg.Message) -> None:
        """What the buffer says."""

    def _awake(self, action: Action) -> None:
        if not self.alive:
            return
        if self.clock.now < self.frozen_until:
            self.clock.at(self.frozen_until - self.clock.now, lambda: self._awake(action))
        else:
            action()


@dataclass(eq=False, kw_only=True)
class Link:
    """The connection of one process with the buffer: in order each way; what is under way when it breaks is lost.

    As ZeroMQ has it: while it is down, what the process sends waits, and what the buffer sends to it is dropped.
    """

    clock: Clock
    identity: bytes
    owner: Process
    to_buffer: Callable[[Link, msg.Message], None]
    up: bool = True
    incarnation: int = 0
    waiting: list[msg.Message] = field(default_factory=list)
    last_there: float = 0.0
    last_back: float = 0.0
    lost: int = 0

    def send(self, message: msg.Message) -> None:
        """To the buffer."""
        if not self.up:
            self.waiting.append(message)
            return
        incarnation = self.incarnation
        self.last_there = max(self.clock.now + self.clock.about(self.clock.delay), self.last_there)
        self.clock.at(self.last_there - self.clock.now, lambda: self._arrive(message, incarnation))

    def answer(self, message: msg.Message) -> None:
        """From the buffer."""
        if not self.up:
            self.lost += 1
            return
        incarnation = self.incarnation
        self.last_back = max(self.clock.now + self.clock.about(self.clock.delay), self.last_back)
        self.clock.at(self.last_back - self.clock.now, lambda: self._come_back(message, incarnation))

    def cut(self, seconds: float) -> None:
        self.incarnation += 1
        if self.up:
            self.up = False
            self.clock.at(seconds, self._mend)

    def _mend(self) -> None:
        self.up = True
        held, self.waiting = self.waiting, []
        for message in held:
            self.send(message)

    def _arrive(self, message: msg.Message, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.to_buffer(self, message)
        else:
            self.lost += 1

    def _come_back(self, message: msg.Message, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.owner.after(0.0, lambda: self.owner.hear(message))
        else:
            self.lost += 1
