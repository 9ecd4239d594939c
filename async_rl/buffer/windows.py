"""Episodes that are trained in pieces (`rollout.window`): what was cut and waits to go on (`Windows`).

A piece is a group of one trajectory, ended as "window". What goes on is a group of its own, at the same position of the
prompt order and with the same seed, admitted like any other: it has its own slot, its own permit and its own bound on
staleness. Its permit starts with all that the episode has said, which carries no loss there, so each token is trained
once. That it goes on is stored with the group (`Decision`), before its permit is given.

An episode goes on once. A piece that is refused for its age before it went on does not: its problem is asked again from
the beginning.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Literal

from async_rl.buffer.ledger import Group
from async_rl.buffer.sampler import Decision, StartChoice

SOURCE: Literal["window"] = "window"
"""of starts that are earlier pieces"""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Piece:
    """What was cut, and has not gone on."""

    group: int
    position: int
    attempt: int
    problem: int
    generator: str = ""
    """that sent it, and may still have its cache"""
    senders: tuple[str, ...] = ()
    """of it and of what came before it"""

    def decision(self) -> Decision:
        """What the group asks in which it goes on."""
        start = StartChoice(source=SOURCE, share=1.0, group=self.group, sample=0)
        return Decision(problem=self.problem, samples=1, seen=0, estimate=0.0, start=start)


@dataclass(slots=True, kw_only=True)
class Windows:
    """The pieces that wait to go on, in the order of admission."""

    waiting: list[Piece] = field(default_factory=list)

    def add(self, group: Group) -> None:
        """A group has arrived whole; if it is a piece, it goes on."""
        if group.cut:
            sender = group.samples[0].generator
            insort(
                self.waiting,
                Piece(
                    group=group.group,
                    position=group.position,
                    attempt=group.attempt,
                    problem=group.problem,
                    generator=sender,
                    senders=tuple(sorted(group.senders)),
                ),
            )

    def take(self, generator: str) -> Piece | None:
        """The piece that goes on next, at this generator: the oldest of its own, else the oldest. None: none waits."""
        if not self.waiting:
            return None
        own = (place for place, piece in enumerate(self.waiting) if piece.generator == generator)
        return self.waiting.pop(next(own, 0))

    def withdraw(self, group: int) -> bool:
        """It does not go on. False when it did already."""
        before = len(self.waiting)
        self.waiting = [piece for piece in self.waiting if piece.group != group]
        return len(self.waiting) < before

    @property
    def oldest(self) -> int | None:
        """Lowest number of a group whose trajectory is still to be given to another; None: none."""
        return self.waiting[0].group if self.waiting else None
