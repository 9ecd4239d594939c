"""The tracker process; started by the launcher. It ends when the launcher closes its pipe, or is gone, and everything
has been sent."""

from __future__ import annotations

import os
import select
import signal

from async_rl.events import TrackerReady
from async_rl.observe.tracker import open_tracker
from async_rl.process_spec import TrackerSpec, read_spec
from async_rl.run_folder import RunFolder

NICE = 10
"""the run's processes come first"""


def main(spec: TrackerSpec) -> None:
    """Send what the run writes to the trackers, until the run ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
    os.nice(NICE)
    folder = RunFolder(spec.path)

    def over(seconds: float) -> bool:
        # the pipe becomes readable when the launcher closes its end
        return bool(select.select([spec.pipes.parent], [], [], seconds)[0])

    tracker = open_tracker(folder, spec.trackers, spec.version)
    folder.record(TrackerReady())
    tracker.follow(over)


if __name__ == "__main__":
    main(read_spec(TrackerSpec))
