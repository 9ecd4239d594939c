"""A virtual clock, processes that die and freeze, and connections that delay, lose, double and reorder messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from math import log
from random import Random

from async_rl.wire import messages as msg

Action = Callable[[], None]


@dataclass(slots=True, eq=False)
class Clock:
    """Runs actions in the order of their time, those of one time in the order of their scheduling."""

    random: Random
    now: float = 0.0
    """seconds"""
    events: list[tuple[float, int, Action]] = field(default_factory=list)
    happened: int = 0
    """actions that were run"""
    count: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, delay: float, action: Action) -> None:
        """Run `action` in `delay` seconds."""
        self.when(self.now + delay, action)

    def when(self, time: float, action: Action) -> None:
        """Run `action` at `time`."""
        heappush(self.events, (time, next(self.count), action))

    def about(self, mean: float) -> float:
        """A random time with this mean, seconds, exponentially distributed."""
        return -log(1.0 - self.random.random()) / (1 / mean)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def step(self) -> None:
        """Run the next action."""
        self.now, _, action = heappop(self.events)
        self.happened += 1
        action()


@dataclass(eq=False, kw_only=True)
class Process:
    """A process of the world. A dead one does nothing, a frozen one does it when it wakes."""

    clock: Clock
    name: str
    pid: int = 0
    alive: bool = True
    frozen_until: float = 0.0

    def after(self, delay: float, action: Action) -> None:
        self.clock.at(delay, partial(self.when_awake, action))

    def when_awake(self, action: Action) -> None:
        """Run `action` now, at the end of the freeze, or never."""
        if not self.alive:
            return
        if self.clock.now < self.frozen_until:
            self.clock.when(self.frozen_until, partial(self.when_awake, action))
        else:
            action()

    def freeze(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self.clock.now + seconds)

    def die(self) -> None:
        self.alive = False

    def receive(self, message: msg.Message) -> None:
        """Handle a message from the buffer."""


@dataclass(slots=True, kw_only=True)
class Network:
    """What happens to messages on their way. Example: `Network(delay_s=0.1, loss=0.05, ordered=False)`."""

    delay_s: float = 0.02
    """how long a message travels: exactly, or on average"""
    exact: bool = False
    loss: float = 0.0
    """chance that a message is lost"""
    double: float = 0.0
    """chance that a message comes twice"""
    ordered: bool = True
    """one connection keeps its messages in order, each way"""


@dataclass(slots=True, eq=False, kw_only=True)
class Link:
    """The connection of one process with the buffer.

    As ZeroMQ has it: what is under way when the connection breaks is lost; while it is down, what the process sends
    waits, and what the buffer sends to it is dropped.
    """

    clock: Clock
    network: Network
    identity: bytes
    owner: Process
    deliver: Callable[[Link, msg.Message], None]
    """hands a message to the buffer"""
    up: bool = True
    incarnation: int = 0
    """connections before this one; what belongs to one of those is lost"""
    waiting: list[msg.Message] = field(default_factory=list)
    last_there: float = 0.0
    """when the newest message to the buffer arrives"""
    last_back: float = 0.0
    lost: int = 0

    def send(self, message: msg.Message) -> None:
        """Send to the buffer."""
        if not self.up:
            self.waiting.append(message)
            return
        incarnation = self.incarnation
        for _ in range(self._copies()):
            at = self.last_there = self._arrival(self.last_there)
            self.clock.when(at, partial(self._arrive, message, incarnation))

    def answer(self, message: msg.Message) -> None:
        """Send from the buffer."""
        if not self.up:
            self.lost += 1
            return
        incarnation = self.incarnation
        for _ in range(self._copies()):
            at = self.last_back = self._arrival(self.last_back)
            self.clock.when(at, partial(self._come_back, message, incarnation))

    def lose(self) -> None:
        """Lose everything that is under way."""
        self.incarnation += 1

    def cut(self, seconds: float) -> None:
        """Break the connection; it is there again after `seconds`."""
        self.lose()
        if self.up:
            self.up = False
            self.clock.at(seconds, self._mend)

    def _copies(self) -> int:
        network = self.network
        if not network.loss and not network.double:
            return 1
        sent = 2 if self.clock.chance(network.double) else 1
        arriving = sum(not self.clock.chance(network.loss) for _ in range(sent))
        self.lost += sent - arriving
        return arriving

    def _arrival(self, last: float) -> float:
        """When a message arrives that is sent now. `last`: when the one before it does."""
        network, clock = self.network, self.clock
        at = clock.now + (network.delay_s if network.exact else clock.about(network.delay_s))
        return max(at, last) if network.ordered else at

    def _mend(self) -> None:
        self.up = True
        held, self.waiting = self.waiting, []
        for message in held:
            self.send(message)

    def _arrive(self, message: msg.Message, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.deliver(self, message)
        else:
            self.lost += 1

    def _come_back(self, message: msg.Message, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.owner.when_awake(partial(self.owner.receive, message))
        else:
            self.lost += 1
