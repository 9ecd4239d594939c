"""Ends a torchrun that outlives its ranks, on a machine of a trainer over several.

torchrun keeps asking the machine that holds its meeting point. When that one is gone without a word, torchrun waits for
it up to five minutes after its own ranks have ended, deaf to SIGTERM. So the first rank that it starts on a machine
starts a small process beside it (`start_watch`).

Who waits for whom: this process for torchrun's end, and for its ranks'; nobody waits for this process.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from async_rl.process import state_of

POLL_S = 1.0
WAIT_S = 15.0
"""time a torchrun has to end after its ranks"""
TOLD_S = 5.0
"""time it has after SIGTERM"""
STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
MAX_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"


def start_watch(environment: Mapping[str, str], summary: Path) -> None:
    """Watch the torchrun that started this rank, if one did and it does not start ranks again. `summary`: file that is
    there when the run is done; then torchrun may wait for other machines, which save the last checkpoint."""
    chosen = STARTED_BY_TORCHRUN in environment and environment.get("LOCAL_RANK", "0") == "0"
    if not chosen or environment.get(MAX_RESTARTS, "0") != "0":
        return
    subprocess.Popen(
        [sys.executable, "-m", "async_rl.run.torchrun_watch", str(os.getppid()), str(summary)],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(torchrun: int, summary: Path, *, wait_s: float = WAIT_S, poll_s: float = POLL_S) -> bool:
    """Until process `torchrun` has ended, or the run is done: whether it had to be ended, `wait_s` after its ranks."""
    try:
        handle = os.pidfd_open(torchrun)
    except ProcessLookupError:
        return False
    last_seen = time.monotonic()
    while not select.select([handle], [], [], poll_s)[0]:
        if _has_ranks(torchrun):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > wait_s:
            if summary.exists():
                return False
            print(_cause(torchrun, wait_s), file=sys.stderr, flush=True)
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not select.select([handle], [], [], TOLD_S)[0]:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            return True
    return False


def _has_ranks(torchrun: int) -> bool:
    """Whether a process that it started is alive."""
    with suppress(OSError):
        for thread in Path(f"/proc/{torchrun}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if state_of(int(child)) not in ("", "Z"):
                    return True
    return False


def _cause(torchrun: int, wait_s: float) -> str:
    meets = ""
    with suppress(OSError):
        words = Path(f"/proc/{torchrun}/cmdline").read_text().replace("\0", " ")
        found = re.search(r"--rdzv[-_]endpoint[ =](\S+)", words)
        meets = f" ({found[1]})" if found else ""
    return (
        f"async-rl: the ranks of torchrun {torchrun} ended {wait_s:g} s ago, and it still waits: the machine that "
        f"holds its meeting point{meets} has died or cannot be reached. It is ended now; the run says what came first"
    )


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]))
