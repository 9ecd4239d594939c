"""A child process that answers questions in JSON, each within a deadline: for packages that must not run in here."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START_DEADLINE_S = 120.0
"""time to import a package, on a machine that is busy"""
GRACE_S = 2.0
"""the child ends itself after the deadline; this much later it is killed"""


class WorkerError(Exception):
    """The question has no answer: the child's own error, or it could not start."""


class WorkerLate(Exception):
    """The child did not answer in time."""


class Worker:
    """One child. Any thread may ask; one question at a time. It starts with the first question, is started anew when it
    died, and ends with this process.

    Its strings hash the same in every process (PYTHONHASHSEED=0), so code that walks through a set of strings does it
    in the same order everywhere.

    Example:
        worker = Worker(Path("worker.py"), ["chain_sum"], deadline_s=10)
        worker.ask(index=3)
    """

    def __init__(self, script: Path, arguments: Sequence[str], *, deadline_s: int) -> None:
        """`script` gets the deadline in seconds and then `arguments`; it writes a line when it is ready, then one JSON
        object for each it reads."""
        self._command = [sys.executable, "-P", str(script), str(deadline_s), *arguments]
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, **question: Any) -> Mapping[str, Any]:
        """The answer. Blocks for at most the deadline, and longer while the child starts. Raises WorkerError,
        WorkerLate."""
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps(question).encode() + b"\n")
                child.stdin.flush()
                answer = _read(child, self._deadline_s + GRACE_S)
            except BrokenPipeError:
                answer = None
            if answer is None:
                self._stop()
                raise WorkerLate(f"no answer within {self._deadline_s} s")
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
        if ready is None or "error" in ready:
            self._stop()
            raise WorkerError(str(ready["error"]) if ready else f"{Path(self._command[2]).name} did not start")
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
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
