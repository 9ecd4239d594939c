"""The generator process; started by the launcher."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from pathlib import Path

from async_rl.process import run_process
from async_rl.run_folder import RunFolder
from async_rl.settings import Settings
from async_rl.wire.channel import AsyncDealer
from async_rl.wire.keys import keys_in


async def generate(folder: RunFolder, settings: Settings, endpoint: str, name: str, weights_endpoint: str) -> None:
    """Build the engine and serve until the buffer says stop."""
    from async_rl.generator.build import make_engine, make_weights
    from async_rl.generator.loop import GeneratorLoop, GeneratorOptions
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import make_task
    from async_rl.weights.shared_memory import segment_path

    tokenizer = Tokenizer(settings.model.path)
    engine = make_engine(settings, tokenizer)
    limit = settings.wire.max_message_mb << 20
    dealer = AsyncDealer(endpoint, name, max_message_bytes=limit, keys=keys_in(settings.wire.keys))
    weights = make_weights(settings, segment_path(folder.path), weights_endpoint, name, here=True)
    options = GeneratorOptions(
        name=name,
        max_sequences=settings.generator.max_sequences,
        group_size=settings.batch.group_size,
        max_turns=settings.generator.max_turns,
        episode_timeout_s=settings.generator.episode_timeout_s,
        save_turns_after_s=settings.generator.save_turns_after_s,
        timeout_s=settings.wire.timeout_s,
    )
    folder.event("generator_ready", name=name, time=time.time())
    try:
        task = make_task(settings.task.name, settings.task.args)
        gc.freeze()  # what imports and set-up left behind is never garbage: do not look through it again
        await GeneratorLoop(options, engine, task, tokenizer, dealer, weights).run()
    finally:
        weights.close()
        dealer.close(deliver=False)  # told to stop: the buffer has gone


def main(path: str, endpoint: str, name: str, weights_endpoint: str) -> None:
    folder = RunFolder(Path(path))

    def work() -> None:
        asyncio.run(generate(folder, folder.settings(), endpoint, name, weights_endpoint))

    run_process(name, folder, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
