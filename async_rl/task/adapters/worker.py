"""A child process that answers questions in JSON, each within a limit of processor time: for what must not run here."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_rl.task.json_child import JsonChild

START_DEADLINE_S = 600.0
"""longest time to import a package, on a machine that is very busy; a child that dies meanwhile is noticed at once"""
PREPARE_S = 120.0
"""processor time of what a child is to answer first"""
PATIENCE = 20
"""the child ends itself when its processor time is used up; on a busy machine that may be so many times later"""


class WorkerError(Exception):
    """The question has no answer: what was raised in the child, or that it could not start."""


class WorkerLate(Exception):
    """The child used up its processor time."""


class Worker:
    """One child. Any thread may ask; one question at a time. It starts with the first question, is started anew when it
    died, and ends with this process.

    Its strings hash the same in every process (PYTHONHASHSEED=0), so code that walks through a set of strings does it
    in the same order everywhere.

    Example:
        worker = Worker(Path("worker.py"), limit_s=10)
        worker.ask({"index": 3})
    """

    def __init__(self, script: Path, *, limit_s: float) -> None:
        """`script` writes a JSON object when it is ready, then one for each that it reads, a line each. It finds the
        seconds of processor time that it has in `limit_s`: the same question then fails or succeeds everywhere, however
        busy a machine is."""
        self._script = script
        self._told: set[str] = set()
        """first questions that this child has answered"""
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._child = JsonChild(
            command=[sys.executable, "-P", str(script)],
            start_s=START_DEADLINE_S,
            environment={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )

    def ask(self, question: Mapping[str, Any], *, after: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The answer. Blocks until it is there, and the first time while the child starts. Raises WorkerError,
        WorkerLate.

        Args:
            after: a question that each child is to have answered first, for which it has PREPARE_S.
        """
        with self._lock:
            before = self._child.process
            if not self._child.start():
                raise WorkerError(f"{self._script.name} did not start; its error stands above")
            if self._child.process is not before:
                self._told.clear()
            if after is not None and (first := json.dumps(after)) not in self._told:
                self._answer(after, PREPARE_S)
                self._told.add(first)
            return self._answer(question, self._limit_s)

    def _answer(self, question: Mapping[str, Any], limit_s: float) -> Mapping[str, Any]:
        try:
            answer = self._child.ask({**question, "limit_s": limit_s}, within_s=limit_s * PATIENCE)
        except BrokenPipeError:  # it has died since the last answer
            answer = None
        if answer is None:
            raise WorkerLate(f"no answer within {limit_s:g} s of processor time")
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._child.stop()
