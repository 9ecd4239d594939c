"""A child process that answers questions in JSON, each within a limit of processor time: for what must not run here."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        self._command = [sys.executable, "-P", str(script)]
        self._told: set[str] = set()
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, question: Mapping[str, Any], *, after: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The answer. Blocks until it is there, and the first time while the child starts. Raises WorkerError,
        WorkerLate.

        Args:
            after: a question that each child is to have answered first, for which it has PREPARE_S.
        """
        with self._lock:
            child = self._running()
            if after is not None and (first := json.dumps(after)) not in self._told:
                self._answer(child, after, PREPARE_S)
                self._told.add(first)
            return self._answer(child, question, self._limit_s)

    def _answer(self, child: subprocess.Popen[bytes], question: Mapping[str, Any], limit_s: float) -> Mapping[str, Any]:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps({**question, "limit_s": limit_s}).encode() + b"\n")
            child.stdin.flush()
            answer = _read(child, limit_s * PATIENCE)
        except BrokenPipeError:  # it has died since the last answer
            answer = None
        if answer is None:
            self._stop()
            raise WorkerLate(f"no answer within {limit_s:g} s of processor time")
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._stop()
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        child = self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        ready = _read(child, START_DEADLINE_S)
        if ready is None:
            self._stop()
            raise WorkerError(f"{Path(self._command[2]).name} did not start; its error stands above")
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        self._told.clear()
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        child.wait()


def _read(child: subprocess.Popen[bytes], deadline_s: float) -> Mapping[str, Any] | None:
    """The child's next line; None when it died or answered nothing in time."""
    assert child.stdout is not None
    until = time.monotonic() + deadline_s
    pieces: list[bytes] = []
    while not (pieces and pieces[-1].endswith(b"\n")):
        left = until - time.monotonic()
        if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
            return None
        read = child.stdout.read(1 << 16)
        if not read:
            return None
        pieces.append(read)
    answer: Mapping[str, Any] = json.loads(b"".join(pieces))
    return answer
