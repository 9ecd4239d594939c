"""A child process that is spoken to in JSON, one object a line (`JsonChild`)."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class JsonChild:
    """One child at a time. It starts when it is asked for, writes an object when it is ready, then one for each that it
    reads. A child that dies or is late is ended; the next call of `start` begins another. Not for several threads."""

    command: Sequence[str]
    start_s: float
    """longest time until the child is ready"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """variables besides those of this process"""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Whether a child runs; starts one where none does."""
        if self.process is not None and self.process.poll() is None:
            return True
        self.stop()
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        return self._answer(self.start_s) is not None

    def ask(self, question: Mapping[str, Any], *, within_s: float) -> Mapping[str, Any] | None:
        """The child's answer; None when it died or answered nothing in time, and it is ended then. Raises
        BrokenPipeError when it has died since the last answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            raise
        return self._answer(within_s)

    def _answer(self, within_s: float) -> Mapping[str, Any] | None:
        """The next line; the child is ended without one."""
        assert self.process is not None
        assert self.process.stdout is not None
        output = self.process.stdout
        until = time.monotonic() + within_s
        pieces: list[bytes] = []
        while not (pieces and pieces[-1].endswith(b"\n")):
            left = until - time.monotonic()
            read = output.read(1 << 16) if left > 0 and select.select([output], [], [], left)[0] else b""
            if not read:
                self.stop()
                return None
            pieces.append(read)
        answer: Mapping[str, Any] = json.loads(b"".join(pieces))
        return answer

    def stop(self) -> None:
        """End the child, if there is one."""
        child, self.process = self.process, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        child.wait()
