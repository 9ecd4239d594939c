"""The buffer process; started by the launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from async_rl.buffer.loop import run_buffer
from async_rl.process import run_process
from async_rl.run_folder import RunFolder


def main(path: str, endpoint: str, train_problems: str, version: str) -> None:
    folder = RunFolder(Path(path))

    def work() -> None:
        run_buffer(folder, folder.settings(), endpoint, int(train_problems), int(version))

    run_process("buffer", folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
