"""The buffer process; started by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from async_rl.buffer.build import make_core
from async_rl.buffer.loop import make_welcome, run_buffer
from async_rl.process import run_process
from async_rl.run_folder import RunFolder
from async_rl.wire.heartbeat import Activity, make_heartbeat


def main(
    path: str,
    endpoint: str,
    train_problems: str,
    vocabulary: str,
    version: str,
    task_digest: str = "",
    segment: str = "",
    weights: str = "",
) -> None:
    """The last three are for generators that join by themselves; without them nobody may."""
    folder = RunFolder(Path(path))

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat("buffer", "buffer", activity, settings.wire, None):
            core = make_core(
                settings, train_problems=int(train_problems), vocabulary=int(vocabulary), run=str(folder.path)
            )
            if task_digest:
                core.attendance.welcome = make_welcome(
                    folder, settings, task_digest=task_digest, segment=segment, weights=weights
                )
            run_buffer(folder, settings, core, endpoint, int(version), activity)

    run_process("buffer", folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
