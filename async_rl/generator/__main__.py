"""The generator process; started by the launcher."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path

from async_rl.config import Settings
from async_rl.events import GeneratorReady
from async_rl.process import TOLD_TO_END, on_order_to_end, run_process
from async_rl.run_folder import RunFolder
from async_rl.wire.channel import AsyncDealer, ipc_endpoint
from async_rl.wire.heartbeat import Activity, Heartbeat, make_heartbeat
from async_rl.wire.keys import keys_in

LEAVE_S = 0.5
"""time the last words of a generator that is told to end have to leave"""


async def generate(
    folder: RunFolder,
    settings: Settings,
    endpoint: str,
    name: str,
    weights_endpoint: str,
    activity: Activity,
    heartbeat: Heartbeat,
) -> None:
    """Build the engine and serve until the buffer says stop. An order to end is obeyed when what is done has
    been handed over."""
    from async_rl.generator.build import make_engine, make_weights
    from async_rl.generator.loop import GeneratorLoop, make_options
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import make_task
    from async_rl.weights.shared_memory import segment_path
    from async_rl.weights.way import WAYS

    tokenizer = Tokenizer(settings.model.path)
    way = os.environ.get(WAYS, "")
    engine = make_engine(settings, tokenizer, way=way)
    limit = settings.wire.max_message_mb << 20
    dealer = AsyncDealer(endpoint, name, max_message_bytes=limit, keys=keys_in(settings.wire.keys))
    links = ipc_endpoint(folder.path, "weights")
    weights = make_weights(settings, segment_path(folder.path), weights_endpoint, name, here=True, way=way, links=links)
    folder.record(GeneratorReady(name=name))
    try:
        task = make_task(settings.task.name, settings.task.args)
        gc.freeze()  # what imports and set-up left behind is never garbage: do not look through it again
        loop = GeneratorLoop(
            make_options(settings, name),
            engine,
            task,
            tokenizer,
            dealer,
            weights,
            activity=activity,
            buffer_silent_s=lambda: heartbeat.buffer_silent_s,
            record=folder.record,
        )
        on_order_to_end(lambda: loop.leave("told to end"))
        await loop.run()
        if loop.leaving:
            dealer.close(linger_s=LEAVE_S)
            raise SystemExit(TOLD_TO_END)
    finally:
        weights.close()
        dealer.close(linger_s=0)  # told to stop: the buffer has gone


def main(path: str, endpoint: str, name: str, weights_endpoint: str) -> None:
    folder = RunFolder(Path(path))

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat(name, "generator", activity, settings.wire, endpoint) as heartbeat:
            asyncio.run(generate(folder, settings, endpoint, name, weights_endpoint, activity, heartbeat))

    run_process(name, folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
