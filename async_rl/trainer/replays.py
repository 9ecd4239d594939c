"""Episodes played again by a child process (`Replays`), beside the training: a thread asks it and waits for it.

The code of a task runs there and nowhere near the trainer. What differs is asked once more of a second child: when
the two disagree, the task is not repeatable, and nothing is compared any more.
"""

from __future__ import annotations

import base64
import queue
import sys
import threading
import time
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
    """two children disagreed"""


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
        lie, reason, unlike = str(found["lie"]), str(found["reason"]), False
        if lie:
            self.confirming = True
            again = self._ask(self.children[1], trajectory)
            self.confirming = False
            if again is None:
                return None
            unlike = (again["lie"], again["reason"]) != (lie, reason)
        whole = bool(found["played"])
        return Played(ticket=ticket, trajectory=trajectory, lie=lie, reason=reason, whole=whole, unlike=unlike)

    def _ask(self, child: JsonChild, trajectory: Trajectory) -> Any:
        """The child's answer; None when there is none."""
        text = base64.b64encode(bytes(pack(trajectory))).decode()
        try:
            return child.ask({"trajectory": text}, within_s=ANSWER_S) if child.start() else None
        except (BrokenPipeError, ValueError):
            child.stop()
            return None
