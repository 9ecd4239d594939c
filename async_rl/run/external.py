"""The stand-in for a trainer that somebody else starts (`trainer.start=external`): torchrun, or a cluster's scheduler.

The launcher starts the stand-in as the run's trainer process. Who waits for whom: it waits for the real trainer to
come, by `trainer.start_timeout_s`, then asks the buffer about it twice a second. It ends as the trainer does: when the
summary is there, or with the trainer's cause; a trainer that is silent for `wire.frozen_after_s` has died or is frozen.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.events import TrainerAwaited
from async_rl.process import run_process
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


@dataclass(slots=True)
class StandIn:
    """Waits for the trainer, and watches it through the buffer."""

    settings: Settings
    folder: RunFolder
    dealer: Dealer
    activity: Activity
    trainer: msg.ProcessState | None = None
    """what the buffer last knew of the trainer; None before it came"""

    def run(self) -> None:
        """Wait until the trainer is done. Raises RunFailed when it does not come, fails or is silent."""
        ranks = self.settings.trainer.ranks
        limit_s = self.settings.trainer.start_timeout_s
        command = start_command(self.folder.path, ranks)
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
                self.check_silence(self.trainer)
            time.sleep(QUERY_S)

    def query(self) -> None:
        """Ask the buffer what it knows of the trainer now."""
        self.dealer.send(msg.Query())
        try:
            answer = self.dealer.receive(QUERY_S, "the buffer's state")
        except (WireTimeout, WireError):
            return  # it is busy, or gone, which is for the launcher to find
        if isinstance(answer, msg.Snapshot):
            found = [process for process in answer.processes if process.role == "trainer"]
            self.trainer = found[0] if found else self.trainer

    def check_silence(self, trainer: msg.ProcessState) -> None:
        """Raises RunFailed when nothing has been heard of the trainer for too long."""
        limit = self.settings.wire.frozen_after_s
        self.activity.keepalive(f"process {trainer.pid}: {trainer.doing}")
        if trainer.silent_s > limit:
            self.check_failure(settle=True)
            raise RunFailed(
                f"the trainer that was started from outside (process {trainer.pid}) gave no sign of life for "
                f"{trainer.silent_s:.1f} s (wire.frozen_after_s={limit:g}): it has died or is frozen; last heard: "
                f"{trainer.doing}; its log is where it was started"
            )

    def check_failure(self, *, settle: bool = False) -> None:
        """Raises RunFailed, or SystemExit for the leader, when a rank has recorded a failure. `settle`: wait a little
        for that."""
        deadline = time.monotonic() + (SETTLE_S if settle else 0.0)
        while True:
            if self.folder.failure("trainer").exists():
                raise SystemExit(1)  # the launcher reads it there
            others = sorted(self.folder.logs.glob("trainer-rank-*.failure.json"))
            if time.monotonic() >= deadline:
                break
            time.sleep(QUERY_S)
        if others and (settle or self.trainer is None):
            raise RunFailed(f"{others[0].name.partition('.')[0]} failed: {others[0].read_text()}")


def start_command(run: Path, ranks: int) -> str:
    """The command that starts the trainer of this run on one host."""
    return f"torchrun --standalone --nproc-per-node {ranks} -m async_rl train {run}"


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
                    command=start_command(folder.path, settings.trainer.ranks),
                )
            )
            StandIn(settings, folder, dealer, activity).run()

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(TrainerSpec))
