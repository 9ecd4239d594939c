"""A pool of worker processes: jobs out, messages in, and the reason when a worker died or hung.

Who waits for whom: this process waits for any worker's message, and for none longer than the deadline of its job. A
worker that misses it is ended and replaced; its job has failed, with the reason.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from async_rl.run.child import arithmetic_environment, describe_end

Job = Mapping[str, Any]
"""plain data with a `kind` and a `name`"""
CHECK_S = 1.0
"""between two checks of the deadlines"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMessage:
    """A message of a worker, or the news of its end."""

    kind: str
    """started | step | note | done"""
    name: str = ""
    """name of the job"""
    step: int = 0
    text: str = ""
    failed: str = ""
    """with `done`: why the job failed, or empty"""


@dataclass(slots=True, kw_only=True)
class LabWorker:
    process: subprocess.Popen[bytes]
    messages: int
    """descriptor of the pipe that they come through"""
    log: Path
    job: Job | None = None
    deadline: float = 0.0
    unread: bytes = b""


@dataclass(slots=True)
class WorkerPool:
    """At most `count` workers, started as there is work for them. Use it in a `with`."""

    count: int
    logs: Path
    timeout_s: float
    """longest time for one job"""
    _workers: list[LabWorker] = field(default_factory=list)
    _started: int = 0
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self, jobs: Iterable[Job]) -> Iterator[WorkerMessage]:
        """Messages of the workers as they come. Every job ends with one `done`."""
        waiting = deque(jobs)
        while waiting or any(w.job is not None for w in self._workers):
            yield from self._hand_out(waiting)
            for key, _ in self._selector.select(CHECK_S):
                yield from self._read(key.data)
            for worker in list(self._workers):
                if worker.job is not None and time.monotonic() > worker.deadline:
                    yield self._lose(worker, f"it took longer than cell_timeout_s={self.timeout_s:g}")

    def _hand_out(self, waiting: deque[Job]) -> Iterator[WorkerMessage]:
        while waiting:
            idle = next((w for w in self._workers if w.job is None), None)
            if idle is None and len(self._workers) < self.count:
                idle = self._start()
            if idle is None:
                return
            idle.job = waiting.popleft()
            idle.deadline = time.monotonic() + self.timeout_s
            yield WorkerMessage(kind="started", name=idle.job["name"])
            assert idle.process.stdin is not None
            try:
                idle.process.stdin.write(json.dumps(idle.job).encode() + b"\n")
                idle.process.stdin.flush()
            except BrokenPipeError:
                yield self._lose(idle, "")

    def _start(self) -> LabWorker:
        read, write = os.pipe()
        self._started += 1
        log = self.logs / f"worker{self._started}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "async_rl.instruments.lab.worker", str(write)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **arithmetic_environment(1)},
                pass_fds=(write,),
                start_new_session=True,  # Ctrl-C in the terminal reaches the lab alone
            )
        os.close(write)
        worker = LabWorker(process=process, messages=read, log=log)
        self._selector.register(read, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _read(self, worker: LabWorker) -> Iterator[WorkerMessage]:
        got = os.read(worker.messages, 1 << 16)
        if not got:
            yield self._lose(worker, "")
            return
        *lines, worker.unread = (worker.unread + got).split(b"\n")
        for line in lines:
            answer = WorkerMessage(**json.loads(line))
            if answer.kind == "done":
                worker.job = None
            yield answer

    def _lose(self, worker: LabWorker, reason: str) -> WorkerMessage:
        """End a worker. The message says what became of its job."""
        if reason:
            worker.process.kill()
        code = worker.process.wait()
        self._forget(worker)
        reason = reason or f"its worker {describe_end(code)} (log: {worker.log})"
        return WorkerMessage(kind="done" if worker.job else "note", name=worker.job["name"] if worker.job else "",
                      failed=reason, text=reason)  # fmt: skip

    def _forget(self, worker: LabWorker) -> None:
        self._selector.unregister(worker.messages)
        os.close(worker.messages)
        if worker.process.stdin is not None:
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
        self._workers.remove(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Workers hold nothing that has to be put away: they are ended at once."""
        for worker in list(self._workers):
            worker.process.kill()
            worker.process.wait()
            self._forget(worker)
        self._selector.close()
