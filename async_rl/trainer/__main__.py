"""The trainer process; started by the launcher."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from async_rl.process import run_process
from async_rl.run_folder import RunFolder, replace_text
from async_rl.settings import Settings
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import keys_in


def train(folder: RunFolder, settings: Settings, endpoint: str, version: int, activity: Activity) -> None:
    """Build the learner, go on from the checkpoint of `version` (0: from the initial model), train, leave
    the summary, say done."""
    import torch

    from async_rl.task import make_task
    from async_rl.trainer.build import make_learner
    from async_rl.trainer.canary import make_canary
    from async_rl.trainer.checkpoint import load_checkpoint, weights_hash
    from async_rl.trainer.inbox import Inbox
    from async_rl.trainer.loop import TrainerLoop
    from async_rl.trainer.manifest import checkpoint_path
    from async_rl.weights.shared_memory import WeightPublisher, segment_path

    activity.now("loading the model")
    torch.set_num_threads(settings.trainer.threads)
    learner = make_learner(settings)
    initial_hash = weights_hash(learner.weights())
    progress = load_checkpoint(checkpoint_path(folder.checkpoints, version), learner) if version else None
    task = make_task(settings.task.name, settings.task.args)
    limit = settings.wire.max_message_mb << 20
    with (
        Dealer(endpoint, "trainer", max_message_bytes=limit, keys=keys_in(settings.wire.keys)) as dealer,
        WeightPublisher(segment_path(folder.path), learner.sent()) as publisher,
    ):
        canary = make_canary(settings, learner, task, folder.event)
        inbox = Inbox(dealer, settings.wire.timeout_s, canary, activity)
        inbox.say(msg.Hello(role="trainer", name="trainer", pid=os.getpid()))
        loop = TrainerLoop(
            settings=settings,
            folder=folder,
            learner=learner,
            inbox=inbox,
            canary=canary,
            publisher=publisher,
            source=Path(settings.model.path),
            eval_problems=len(task.problems("eval")),
            initial_hash=initial_hash,
        )
        if progress is not None:
            loop.resume(progress)
        sent = sum(t.numel() * t.element_size() for t in learner.sent().values())
        folder.event("trainer_ready", weights_bytes=sent, time=time.time())
        summary = loop.run()
        replace_text(folder.summary, json.dumps(summary.to_dict(), indent=2) + "\n")
        dealer.send(msg.Done())


def main(path: str, endpoint: str, version: str) -> None:
    folder = RunFolder(Path(path))

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat("trainer", "trainer", activity, settings.wire, endpoint):
            train(folder, settings, endpoint, int(version), activity)

    run_process("trainer", folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
