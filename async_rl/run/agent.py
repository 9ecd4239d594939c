"""The trainer's process where it has several ranks: torch.distributed's elastic agent, which starts and watches them.

It does what `torchrun --nproc-per-node R --max-restarts 0 -m async_rl.trainer ...` does, with two differences. The
ranks find each other by a fixed address on the loopback: torchrun's own choice (`--standalone`) keeps pickled records
in a store that listens on every interface. And when several ranks have failed, the agent finds the one that failed
first and reports that one.

Who waits for whom: the agent polls its ranks ten times a second. When one ends badly, the agent ends the others; when
the agent ends, however, its ranks end with it.
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
from typing import Any

from msgspec.structs import replace

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.process import MISSED, TOLD_TO_END, Terminated, process_name, run_process
from async_rl.process_spec import TrainerSpec, read_spec
from async_rl.run.child import describe_end, memory_kills
from async_rl.run_folder import RunFolder
from async_rl.wire.endpoint import LOOPBACK, hold_port, port_of
from async_rl.wire.heartbeat import Activity, make_heartbeat

GIVE_WAY_S = 2
"""time ranks get to end after being told to; less than the launcher gives the agent"""


def serve(spec: TrainerSpec, folder: RunFolder, settings: Settings) -> None:
    """Run all ranks to their end. Raises RunFailed naming the rank that failed first, or SystemExit where the leader
    has recorded the cause itself, or when told to end."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: nobody else is listened to
    kills_before = memory_kills()
    with tempfile.TemporaryDirectory() as scratch, hold_port() as meeting:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=settings.trainer.ranks,
            run_id="trainer",
            role="trainer",
            rdzv_backend="static",
            rdzv_endpoint=f"{LOOPBACK}:{port_of(meeting)}",
            rdzv_configs={"rank": 0, "timeout": int(settings.wire.timeout_s)},
            local_addr=LOOPBACK,
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
            signals_to_handle="SIGTERM",
            shutdown_timeout=GIVE_WAY_S,
        )
        try:
            of_a_rank = replace(spec, agent=os.getpid())
            elastic_launch(config, sys.executable)("-m", "async_rl.trainer", of_a_rank.to_json())
        except SignalException:
            raise Terminated(TOLD_TO_END) from None
        except ChildFailedError as error:
            ends = {r: RankEnd(code=f.exitcode, second=int(f.timestamp)) for r, f in error.failures.items()}
            raise first_to_fall(folder, ends, kills_before) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """How a rank ended that ended badly."""

    code: int
    """exit code; negative: the signal that killed it"""
    second: int
    """when the agent saw it, since the epoch"""


def first_to_fall(folder: RunFolder, ends: Mapping[int, RankEnd], kills_before: int | None) -> RunFailed | SystemExit:
    """The failure of the rank that is the cause. `kills_before`: `memory_kills` when the ranks were started.

    Ranks are ordered by how likely they are the cause, then by the time of their record:

    1. those that something killed, which could record nothing, and those that recorded an error of their own,
    2. those that aborted without a record: NCCL does that to a rank that waits for another,
    3. those that recorded that another rank did not come,
    4. those that the agent ended because one had failed.
    """
    recorded = {rank: _failure(folder, rank) for rank in ends}
    first = min(end.second for end in ends.values())

    def order(rank: int) -> tuple[int, float]:
        end, record = ends[rank], recorded[rank]
        killed_late = end.code == -signal.SIGKILL and end.second >= first + GIVE_WAY_S
        if not record and (killed_late or end.code in (TOLD_TO_END, -signal.SIGTERM)):
            blame = 4
        elif MISSED in record.get("message", ""):
            blame = 3
        elif not record and end.code == -signal.SIGABRT:
            blame = 2
        else:
            blame = 1
        return blame, float(record.get("time", 0.0))

    rank = min(ends, key=order)
    record = recorded[rank]
    if rank == 0 and record:
        return SystemExit(2 if record["kind"] == "user" else 1)
    log = folder.logs / f"{process_name(rank)}.log"
    if record:
        return RunFailed(f"rank {rank}: {record['message']} (its log: {log})")
    return RunFailed(f"rank {rank} {describe_end(ends[rank].code, kills_before)} (its log: {log})")


def _failure(folder: RunFolder, rank: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads(folder.failure(process_name(rank)).read_text()))
    return {}


def main(spec: TrainerSpec) -> None:
    """Run the trainer's ranks; ends this process."""
    folder = RunFolder(spec.path)

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat(spec.name, "trainer", activity, settings.wire, None, pipe=spec.pipes.pulse):
            activity.now(f"watching {settings.trainer.ranks} ranks")
            serve(spec, folder, settings)

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(TrainerSpec))
