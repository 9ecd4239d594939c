"""Episodes played again by a child process (`Replays`), beside the training: a thread asks it and waits for it.

The code of a task runs there and nowhere near the trainer. What differs is asked twice more of a second child, and so
are episodes that were played before, whatever came of them: when the two children disagree anywhere, the task is not
repeatable, and nothing is compared any more. That is how a reward with noise is told from a lie: noise is in what the
children say as often as in what a generator says. For a proof they must have agreed on SURE episodes.
"""

from __future__ import annotations

import base64
import queue
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from async_rl.task.json_child import JsonChild
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack

START_S = 120.0
"""longest time until the child is ready: it reads the data set"""
ANSWER_S = 30.0
"""longest time for one episode"""
MOST_WAITING = 64
"""episodes that wait for the child; what comes then is not compared"""
POLL_S = 0.01
CLOSE_S = 3.0
"""longest time for its end"""
KEPT = 64
"""episodes that were played last and are asked again when one differs"""
MOST_CONFIRMED = 8
"""times that they are asked again; what differs afterwards is only asked again itself"""
CONFIRM_S = 10.0
"""longest time for these, each time"""
SURE = 20
"""episodes that both children must have agreed on before a generator is proven to report other rewards: of a reward
that is a toss of a coin they do with a probability of 2^-20"""
MOST_LOST = 3
"""episodes in a row that the child did not come back from: then it is not asked any more"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of one episode."""

    ticket: Any
    """as it was given with the episode"""
    trajectory: Trajectory
    lie: str = ""
    """prompts or rewards; empty: nothing is wrong"""
    reason: str = ""
    whole: bool = False
    """more than its prompt was compared"""
    unlike: bool = False
    """two children disagreed; the reason says where"""


@dataclass(slots=True)
class Replays:
    """Asks a child, and of what differs another one, which is started then."""

    run: str
    """folder of the run"""
    asked: queue.Queue[tuple[Any, Trajectory] | None] = field(default_factory=lambda: queue.Queue(MOST_WAITING))
    answers: queue.SimpleQueue[Played | None] = field(default_factory=queue.SimpleQueue)
    thread: threading.Thread | None = None
    over: bool = False
    """nothing is compared any more"""
    lost: int = 0
    """episodes in a row that the child did not come back from"""
    pending: int = 0
    """questions that are not answered"""
    confirming: bool = False
    """something differs, and the second child is asked"""
    kept: deque[tuple[Trajectory, tuple[str, str]]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """the last episodes played, and what the first child said of each"""
    doubts: int = 0
    """episodes that the first child found to differ"""
    agreed: set[tuple[str, int, int]] = field(default_factory=set)
    """(split, group, sample) of the first SURE episodes that both children agreed on"""
    children: tuple[JsonChild, JsonChild] = field(init=False)

    def __post_init__(self) -> None:
        self.children = self._make(), self._make()

    def _make(self) -> JsonChild:
        return JsonChild(
            command=[sys.executable, "-m", "async_rl.generator.replay", self.run],
            start_s=START_S,
            environment={"OMP_NUM_THREADS": "1"},
        )

    def start(self) -> None:
        """Have the first child ready before the first question."""
        if self.thread is None and not self.over:
            self.thread = threading.Thread(target=self._work, name="replays", daemon=True)
            self.thread.start()

    def ask(self, ticket: Any, trajectory: Trajectory) -> bool:
        """Have an episode played again. False where that is not done."""
        if self.over:
            return False
        self.start()
        try:
            self.asked.put_nowait((ticket, trajectory))
        except queue.Full:
            return False
        self.pending += 1
        return True

    def take(self) -> list[Played]:
        """The answers that have come since."""
        found = []
        while not self.answers.empty():
            self.pending -= 1
            if (played := self.answers.get()) is not None:
                found.append(played)
        return found

    def settle(self, within_s: float) -> list[Played]:
        """The answers to all that was asked, or those that come in time."""
        deadline, found = time.monotonic() + within_s, self.take()
        while self.pending and not self.over and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found += self.take()
        return found

    def close(self) -> None:
        """End thread and child."""
        self.over = True
        if self.thread is None:
            return
        with suppress(queue.Full):
            self.asked.put_nowait(None)
        for child in self.children:
            if (process := child.process) is not None:
                process.kill()  # whoever waits for its answer gets none
        self.thread.join(CLOSE_S)
        self.thread = None

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        self.children[0].start()
        while (question := self.asked.get()) is not None and not self.over:
            played = self._answer(*question)
            self.answers.put(played)
            self.over = self.over or (played is not None and played.unlike)
        for child in self.children:
            child.stop()

    def _answer(self, ticket: Any, trajectory: Trajectory) -> Played | None:
        found = self._ask(self.children[0], trajectory)
        if found is None:
            self.lost += 1
            self.over = self.over or self.lost >= MOST_LOST
            return None
        self.lost = 0
        said, whole = _said(found), bool(found["played"])
        self.kept.append((trajectory, said))
        if not said[0]:
            return Played(ticket=ticket, trajectory=trajectory, whole=whole)
        self.confirming = True
        unlike = self._disagreement(trajectory, said)
        self.confirming = False
        if unlike is None:
            return None
        lie, why = said
        return Played(
            ticket=ticket, trajectory=trajectory, lie=lie, reason=unlike or why, whole=whole, unlike=bool(unlike)
        )

    def _disagreement(self, trajectory: Trajectory, said: tuple[str, str]) -> str | None:
        """What the second child says otherwise, of this episode, of those before it, or of this one asked again; empty:
        nothing; None: it does not come back."""
        self.doubts += 1
        others = self.kept if self.doubts <= MOST_CONFIRMED else ()
        deadline = time.monotonic() + CONFIRM_S
        for one, before in [(trajectory, said), *others, (trajectory, said)]:
            if time.monotonic() > deadline and one is not trajectory:
                continue
            if (found := self._ask(self.children[1], one)) is None:
                return None
            if (again := _said(found)) != before:
                told = " and then: ".join(reason or "all is as reported" for _, reason in (before, again))
                return f"sample {one.sample} of group {one.group}, played again twice: {told}"
            if len(self.agreed) < SURE:
                self.agreed.add((one.split, one.group, one.sample))
        return ""

    @property
    def sure(self) -> bool:
        """Whether the children have agreed often enough for a proof."""
        return len(self.agreed) >= SURE

    def _ask(self, child: JsonChild, trajectory: Trajectory) -> Any:
        """The child's answer; None when there is none."""
        text = base64.b64encode(bytes(pack(trajectory))).decode()
        try:
            return child.ask({"trajectory": text}, within_s=ANSWER_S) if child.start() else None
        except (BrokenPipeError, ValueError):
            child.stop()
            return None


def _said(answer: Any) -> tuple[str, str]:
    return str(answer["lie"]), str(answer["reason"])
