"""math-verify at arm's length: a verdict can take forever or the memory of the machine, a child cannot."""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from async_rl.errors import UserError

DEADLINE_S = 5
START_DEADLINE_S = 60.0
GRACE_S = 2.0


class JudgeError(Exception):
    """No verdict, for a reason that is not the completion's fault."""


class VerdictTimeout(Exception):
    """The completion could not be judged in time: nobody can say that it is right."""


class MathJudge:
    """Asks a child process that runs math-verify. Any thread may ask; one verdict at a time.

    math-verify guards itself with SIGALRM, which fails outside the main thread and disturbs an event loop;
    without that guard `9^{9^{9^9}}` hangs it. So it runs in a child without its guard and under a kernel
    alarm. The child starts at the first question, is replaced when it dies, and ends with this process.
    """

    def __init__(self, *, deadline_s: int = DEADLINE_S) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the reward 'math' needs math-verify: pip install 'async-rl[math]'")
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def score(self, completion: str, answer: str) -> float:
        """1.0 or 0.0. Raises VerdictTimeout or JudgeError. Blocks for `deadline_s` at most (and, the first
        time, while the child starts)."""
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps({"completion": completion, "answer": answer}).encode() + b"\n")
                child.stdin.flush()
            except BrokenPipeError:
                self._stop()
                raise JudgeError("the process that runs math-verify has died") from None
            said = self._read(child, self._deadline_s + GRACE_S)
            if said is None:
                self._stop()
                raise VerdictTimeout(f"no verdict within {self._deadline_s} s")
        if "error" in said:
            raise JudgeError(said["error"])
        return float(said["score"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        worker = Path(__file__).with_name("math_worker.py")
        # -P: files beside the worker (order.py, rows.py, ...) must not hide modules that math-verify imports.
        command = [sys.executable, "-P", str(worker), str(self._deadline_s)]
        child = self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._read(child, START_DEADLINE_S) is None:
            self._stop()
            raise JudgeError("the process that runs math-verify did not start; try: python -c 'import math_verify'")
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

    @staticmethod
    def _read(child: subprocess.Popen[bytes], deadline_s: float) -> dict[str, str] | None:
        """The child's next line; None when it died or said nothing in time."""
        assert child.stdout is not None
        until = time.monotonic() + deadline_s
        line = b""
        while not line.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                return None
            read = child.stdout.read(65536)
            if not read:
                return None
            line += read
        said: dict[str, str] = json.loads(line)
        return said
