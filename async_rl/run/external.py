"""The stand-in for a trainer that somebody else starts (`trainer.start=external`): torchrun, or a cluster's scheduler.

The launcher starts the stand-in as the run's trainer process. Who waits for whom: it waits for the real trainer to
come, by `trainer.start_timeout_s`, then asks the buffer about it twice a second. It ends as the trainer does: when the
summary is there, or with the trainer's cause; a trainer that is silent for `wire.frozen_after_s` has died or is frozen.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import TrainerAwaited
from async_rl.process import MISSED, run_process
from async_rl.process_spec import TrainerSpec, read_spec
from async_rl.run_folder import RunFolder
from async_rl.trajectory.codec import WireError
from async_rl.version import __version__
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.endpoint import this_host
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import keys_in

QUERY_S = 0.5
"""between two questions to the buffer"""
SETTLE_S = 2.0
"""time its ranks get to record why they ended"""
MEETING_PORT = 29_400
"""where torchruns of several machines meet: torch's own default"""
RANK_FAILURES = "trainer-rank-*.failure.json"


@dataclass(slots=True)
class StandIn:
    """Waits for the trainer, and watches it through the buffer."""

    settings: Settings
    folder: RunFolder
    dealer: Dealer
    activity: Activity
    trainer: msg.ProcessState | None = None
    """what the buffer last knew of the trainer; None before it came"""
    ranks: dict[str, msg.ProcessState] = field(default_factory=dict)
    """what it last knew of each rank that it hears, rank 0 included, by name"""

    def run(self) -> None:
        """Wait until the trainer is done. Raises RunFailed when it does not come, fails or is silent."""
        limit_s = self.settings.trainer.start_timeout_s
        command = start_command(self.folder.path, self.settings)
        self.activity.now(f"waiting for somebody to start the trainer: {command}")
        deadline = time.monotonic() + limit_s
        while not self.folder.summary.exists():
            self.query()
            self.check_failure()
            if self.trainer is None and time.monotonic() > deadline:
                raise RunFailed(
                    f"nobody has started the trainer within {limit_s:g} s (trainer.start_timeout_s); start it with "
                    f"`{command}` while the run waits"
                )
            if self.trainer is not None:
                self.activity.keepalive(f"process {self.trainer.pid}: {self.trainer.doing}")
            for rank in self.ranks.values():
                self.check_silence(rank)
            time.sleep(QUERY_S)

    def query(self) -> None:
        """Ask the buffer what it knows of the trainer now."""
        self.dealer.send(msg.Query())
        try:
            answer = self.dealer.receive(QUERY_S, "the buffer's state")
        except (WireTimeout, WireError):
            return  # it is busy, or gone, which is for the launcher to find
        if isinstance(answer, msg.Snapshot):
            found = {p.name: p for p in answer.processes if p.role in ("trainer", msg.RANK)}
            self.ranks |= found
            self.trainer = found.get("trainer", self.trainer)

    def check_silence(self, rank: msg.ProcessState) -> None:
        """Raises RunFailed when nothing has been heard of a rank for too long."""
        limit = self.settings.wire.frozen_after_s
        if rank.silent_s <= limit or self.folder.summary.exists():
            return
        self.check_failure(settle=True)
        named = "the trainer that was" if rank.name == "trainer" else f"{rank.name}, which was"
        raise RunFailed(
            f"{named} started from outside (process {rank.pid}{_on(rank)}) gave no sign of life for "
            f"{rank.silent_s:.1f} s (wire.frozen_after_s={limit:g}): it has died, is frozen, or cannot be reached any "
            f"more; last heard: {rank.doing}; its log is where it was started"
        )

    def check_failure(self, *, settle: bool = False) -> None:
        """Raises RunFailed, or SystemExit where the launcher finds the cause, when a rank has recorded a failure.
        `settle`: wait a little for that."""
        if not settle and not self.failures():
            return
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:  # of those that fail together the cause may come last
            self.query()
            time.sleep(QUERY_S)
        if failures := self.failures():
            raise first_cause(failures, self.ranks)

    def failures(self) -> dict[str, dict[str, Any]]:
        """What ranks have recorded about their end, by name."""
        found = {}
        for name in ("trainer", *(path.name.partition(".")[0] for path in self.folder.logs.glob(RANK_FAILURES))):
            with suppress(OSError, ValueError):  # not there, or being written
                found[name] = dict(json.loads(self.folder.failure(name).read_text()))
        return found


def first_cause(
    failures: Mapping[str, Mapping[str, Any]], ranks: Mapping[str, msg.ProcessState]
) -> RunFailed | SystemExit:
    """Why the trainer has ended, from what its ranks have recorded, and what was last heard of each: a machine that
    left no record is the cause where the others only missed its ranks."""
    told = {name: str(record.get("message", "")) for name, record in failures.items()}
    own = [name for name, message in told.items() if MISSED not in message]
    if own and "trainer" not in own:
        return RunFailed(f"{own[0]} failed: {told[own[0]]}{_on(ranks.get(own[0]))}; its log is where it was started")
    alive = {ranks[name].host for name in told if name in ranks}
    gone = [rank for rank in ranks.values() if rank.host and rank.host not in alive]
    if not own and gone:
        names = ", ".join(sorted(rank.name for rank in gone))
        hosts = " and ".join(sorted({rank.host for rank in gone}))
        heard = min(gone, key=lambda rank: rank.silent_s)
        return RunFailed(
            f"{hosts} has died or cannot be reached: its part of the trainer ({names}) is gone without a word, last "
            f"heard {heard.silent_s:.1f} s ago: {heard.doing}. The others: {next(iter(told.values()))}"
        )
    if "trainer" in told:
        return SystemExit(1)  # the launcher reads it there
    return RunFailed(f"{next(iter(told))} failed: {next(iter(told.values()))}; its log is where it was started")


def _on(rank: msg.ProcessState | None) -> str:
    return f" on {rank.host}" if rank is not None and rank.host else ""


def start_command(run: Path, settings: Settings) -> str:
    """The command that starts the trainer of this run; with several machines on each of them."""
    chosen = settings.trainer
    if chosen.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {chosen.ranks} -m async_rl train {run}"
    return (
        f"torchrun --nnodes {chosen.nodes} --nproc-per-node {chosen.ranks // chosen.nodes} --rdzv-backend c10d "
        f"--rdzv-id {run.name} --rdzv-endpoint FIRST-MACHINE:{MEETING_PORT} -m async_rl train {run}"
    )


def main(spec: TrainerSpec) -> None:
    """Stand for the trainer until it is done; ends this process."""
    folder = RunFolder(spec.path)

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with (
            make_heartbeat(spec.name, "trainer", activity, settings.wire, None, pipe=spec.pipes.pulse),
            Dealer(spec.endpoint, f"trainer-stand-in/{os.getpid()}", keys=keys_in(settings.wire.keys)) as dealer,
        ):
            folder.record(
                TrainerAwaited(
                    endpoint=spec.endpoint,
                    version=spec.version,
                    package=__version__,
                    host=this_host(),
                    folder=str(Path.cwd()),
                    ranks=settings.trainer.ranks,
                    command=start_command(folder.path, settings),
                    weights=spec.weights_endpoint,
                )
            )
            StandIn(settings, folder, dealer, activity).run()

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(TrainerSpec))
