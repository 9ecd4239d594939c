"""The trainer's process where it has several ranks: torch.distributed's elastic agent, which starts and watches them.

As `torchrun --nproc-per-node R --max-restarts 0 -m async_rl.trainer ...` does, but for two things. The ranks find
each other by a fixed address on the loopback: torchrun's own choice (`--standalone`) keeps pickled records in a
store that listens on every interface. And of several ranks that fell the agent finds the first one, and says so.

Who waits for whom: the agent for its ranks, by looking ten times a second. When one ends badly, it ends the others;
when the agent ends, however, its ranks end with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.process import AGENT, MISSED, TOLD_TO_END, process_name, run_process
from async_rl.run.child import how_it_ended, memory_kills
from async_rl.run_folder import RunFolder
from async_rl.wire.endpoint import LOOPBACK, free_port
from async_rl.wire.heartbeat import Activity, make_heartbeat

GIVE_WAY_S = 2
"""time ranks get to end after being told to; less than the launcher gives the agent"""


def serve(folder: RunFolder, settings: Settings, ranks: int, words: tuple[str, ...]) -> None:
    """Run all ranks to their end. Raises RunFailed naming the rank that fell first, SystemExit where it has said
    why itself, or when told to end."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[AGENT] = str(os.getpid())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: nobody else is listened to
    before = memory_kills()
    with tempfile.TemporaryDirectory() as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="trainer",
            role="trainer",
            rdzv_backend="static",
            rdzv_endpoint=f"{LOOPBACK}:{free_port()}",
            rdzv_configs={"rank": 0, "timeout": int(settings.wire.timeout_s)},
            local_addr=LOOPBACK,
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle="SIGTERM",
            shutdown_timeout=GIVE_WAY_S,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "async_rl.trainer", *words)
        except SignalException:
            raise SystemExit(TOLD_TO_END) from None
        except ChildFailedError as error:
            ends = {r: End(code=f.exitcode, second=int(f.timestamp)) for r, f in error.failures.items()}
            raise first_to_fall(folder, ends, before) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Of a rank that ended badly."""

    code: int
    second: int
    """when the agent saw it"""


def first_to_fall(folder: RunFolder, ends: Mapping[int, End], kills_before: int | None) -> RunFailed | SystemExit:
    """The rank that is the cause: one that could not say why (something killed it), else the first that did. Behind
    these one that aborted without a word, which NCCL does to a rank that waits for another; then those that only
    missed another. Those that the agent ended because of it come last. `kills_before`: for lack of memory, when the
    ranks began."""
    said = {rank: _failure(folder, rank) for rank in ends}
    first = min(end.second for end in ends.values())

    def order(rank: int) -> tuple[int, float]:
        end = ends[rank]
        by_force = end.code == -signal.SIGKILL and end.second >= first + GIVE_WAY_S
        ended_by_us = not said[rank] and (by_force or end.code in (TOLD_TO_END, -signal.SIGTERM))
        aborted = not said[rank] and end.code == -signal.SIGABRT
        missed = MISSED in said[rank].get("message", "")
        place = 3 if ended_by_us else 2 if missed else 1 if aborted else 0
        return place, float(said[rank].get("time", 0.0))

    rank = min(ends, key=order)
    if rank == 0 and said[rank]:
        return SystemExit(2 if said[rank]["kind"] == "user" else 1)
    log = folder.logs / f"{process_name(rank)}.log"
    if said[rank]:
        return RunFailed(f"rank {rank}: {said[rank]['message']} (its log: {log})")
    return RunFailed(f"rank {rank} {how_it_ended(ends[rank].code, kills_before)} (its log: {log})")


def _failure(folder: RunFolder, rank: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(folder.failure(process_name(rank)).read_text()))
    return {}


def main(ranks: str, *words: str) -> None:
    """`words`: those of the trainer's process; first of them the run's folder."""
    folder = RunFolder(Path(words[0]))

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat("trainer", "trainer", activity, settings.wire, None):
            activity.now(f"watching {ranks} ranks")
            serve(folder, settings, int(ranks), words)

    run_process("trainer", folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
