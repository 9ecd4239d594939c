"""The weight server: gives the weights of a run to generators of other hosts. Started by the launcher when
the buffer listens on TCP.

A process and a socket of its own, so that many megabytes delay neither the buffer nor the trainer: it maps
the trainer's segment like a generator and copies a version when somebody asks for it. It waits for nobody.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from async_rl.process import run_process
from async_rl.run_folder import RunFolder
from async_rl.settings import Settings
from async_rl.trajectory.codec import WireError
from async_rl.weights.chunks import Shelf
from async_rl.weights.shared_memory import WeightReader, segment_path
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import keys_in

POLL_S = 0.2


def serve(folder: RunFolder, settings: Settings, endpoint: str, activity: Activity) -> None:
    """Until the run has its summary, or the launcher says stop."""
    limit = settings.wire.max_message_mb << 20
    with (
        Router(endpoint, max_message_bytes=limit, keys=keys_in(settings.wire.keys)) as router,
        WeightReader(segment_path(folder.path)) as reader,
    ):
        folder.event("weights_ready", time=time.time(), endpoint=endpoint)
        shelf = Shelf(reader.latest, reader.copy)
        activity.looping = True
        while not folder.summary.exists():
            activity.still("serving weights")
            answer(router, shelf)
            shelf.tick(time.monotonic())


def answer(router: Router, shelf: Shelf) -> None:
    """Wait a moment for a message, and answer it."""
    received = router.receive(POLL_S)
    if received is None:
        return
    peer, message = received
    if isinstance(message, WireError):
        router.send(peer, msg.Refused(what="message", reason=str(message)))
        return
    for reply in shelf.handle(peer, message, time.monotonic()):
        router.send(peer, reply)


def main(path: str, endpoint: str) -> None:
    folder = RunFolder(Path(path))

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        activity.now("serving weights")
        with make_heartbeat("weights", "weights", activity, settings.wire, None):
            serve(folder, settings, endpoint, activity)

    run_process("weights", folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
