"""The tracker process: python -m async_rl.observe RUN VERSION TRACKER [...]

It ends when the launcher closes its pipe, or is gone, and everything has been sent.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

from async_rl.events import TrackerReady
from async_rl.observe.tracker import open_tracker
from async_rl.process import PARENT_PIPE
from async_rl.run_folder import RunFolder

NICE = 10
"""the run's processes come first"""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
    os.nice(NICE)
    folder, version, names = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3:]
    descriptor = int(os.environ[PARENT_PIPE])

    def over(seconds: float) -> bool:
        return bool(select.select([descriptor], [], [], seconds)[0])  # readable: closed at the other end

    tracker = open_tracker(folder, names, version)
    folder.record(TrackerReady())
    tracker.follow(over)


if __name__ == "__main__":
    main()
