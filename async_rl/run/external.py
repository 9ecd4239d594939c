"""Stands for a trainer that somebody else starts (`trainer.start=external`): torchrun, or a cluster's scheduler.

Who waits for whom: it waits for that trainer to come, by `trainer.start_timeout_s`, then hears of it through the
buffer, once a second. It ends as the trainer does: when the summary is there, or with its cause; one that is silent
for `wire.frozen_after_s` has died or is frozen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import to_builtins

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

ASK_S = 0.5
SETTLE_S = 2.0
"""time its ranks get to write down why they ended"""


@dataclass(slots=True)
class StandIn:
    settings: Settings
    folder: RunFolder
    dealer: Dealer
    activity: Activity
    row: Mapping[str, Any] = field(default_factory=dict)
    """what the buffer last knew of the trainer; empty before it came"""

    def run(self) -> None:
        """Until the trainer is done. Raises RunFailed when it does not come, fails or is silent."""
        ranks = self.settings.trainer.ranks
        limit_s = self.settings.trainer.start_timeout_s
        command = start_command(self.folder.path, ranks)
        self.activity.now(f"waiting for somebody to start the trainer: {command}")
        deadline = time.monotonic() + limit_s
        while not self.folder.summary.exists():
            self.ask()
            self.look_for_failure()
            if not self.row and time.monotonic() > deadline:
                raise RunFailed(
                    f"nobody has started the trainer within {limit_s:g} s (trainer.start_timeout_s); start it with "
                    f"`{command}` while the run waits"
                )
            if self.row:
                self.judge()
            time.sleep(ASK_S)

    def ask(self) -> None:
        """What the buffer knows of the trainer now."""
        self.dealer.send(msg.Query())
        try:
            answer = self.dealer.receive(ASK_S, "the buffer's state")
        except (WireTimeout, WireError):
            return  # it is busy, or gone, which is for the launcher to find
        if isinstance(answer, msg.Snapshot):
            found = [to_builtins(row) for row in answer.processes if row.role == "trainer"]
            self.row = found[0] if found else self.row

    def judge(self) -> None:
        silent, limit = float(self.row["silent_s"]), self.settings.wire.frozen_after_s
        self.activity.still(f"process {self.row['pid']}: {self.row['doing']}")
        if silent > limit:
            self.look_for_failure(settle=True)
            raise RunFailed(
                f"the trainer that was started from outside (process {self.row['pid']}) gave no sign of life for "
                f"{silent:.1f} s (wire.frozen_after_s={limit:g}): it has died or is frozen; last heard: "
                f"{self.row['doing']}; its log is where it was started"
            )

    def look_for_failure(self, *, settle: bool = False) -> None:
        """Raises what a rank has left of its failure, the leader's first."""
        deadline = time.monotonic() + (SETTLE_S if settle else 0.0)
        while True:
            if self.folder.failure("trainer").exists():
                raise SystemExit(1)  # the launcher reads it there
            others = sorted(self.folder.logs.glob("trainer-rank-*.failure.json"))
            if time.monotonic() >= deadline:
                break
            time.sleep(ASK_S)
        if others and (settle or not self.row):
            raise RunFailed(f"{others[0].name.partition('.')[0]} failed: {others[0].read_text()}")


def start_command(run: Path, ranks: int) -> str:
    """What starts the trainer of this run on one host."""
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
