"""The launcher's side of the tracker process: started beside the run, never waited for while it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from async_rl.errors import RunFailed
from async_rl.launch.child import how_it_ended
from async_rl.process import PARENT_PIPE
from async_rl.run_folder import RunFolder

FINISH_S = 10.0
"""time it gets to send the rest when the run has ended"""


@dataclass(slots=True)
class Tracking:
    folder: RunFolder
    process: subprocess.Popen[bytes] | None = None
    """None: no tracker, or its end has been dealt with"""

    @classmethod
    def start(cls, folder: RunFolder, names: Sequence[str], version: int, *, parent_pipe: int, lock: int) -> Self:
        """`version`: where this launch begins; `parent_pipe`: the end that closes when the launcher is done or dies;
        `lock`: of the run, so that the next launch waits for the end of this one's tracker."""
        if not names:
            return cls(folder)
        with (folder.logs / "tracker.log").open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "async_rl.observe", str(folder.path), str(version), *names],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, PARENT_PIPE: str(parent_pipe)},
                pass_fds=(parent_pipe, lock),
                start_new_session=True,
            )
        folder.event("started", process="tracker", pid=process.pid, time=time.time())
        return cls(folder, process)

    def look(self) -> None:
        """A tracker that has ended is told of once; the run goes on."""
        if self.process is None or self.process.poll() is None:
            return
        code, self.process = self.process.returncode, None
        if code != 0:
            self._failed(f"it {how_it_ended(code)}; see {self.folder.logs / 'tracker.log'}")

    def finish(self) -> None:
        """The pipe is closed: wait a little for the rest to be sent."""
        if self.process is None:
            return
        try:
            self.process.wait(FINISH_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.process = None
            self._failed(f"it did not send everything within {FINISH_S:g} s after the end of the run, and was ended")
        self.look()

    def _failed(self, reason: str) -> None:
        with suppress(RunFailed):  # a full disk: what matters has been said by others
            self.folder.event("tracker_failed", name="tracker", reason=reason, time=time.time())
