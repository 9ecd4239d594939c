"""A generator that takes weights from a broadcast, without vLLM: what its worker does, in one process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from async_rl.generator.pull import LinkSource, TransferEnded
from async_rl.weights import receiver
from async_rl.weights.canary import fingerprint
from async_rl.weights.communicator import Meeting
from async_rl.weights.receiver import Receiver

Say = Callable[..., None]
STOPS_AT = 2
"""the version that a generator does not get through"""


class Engine:
    """What VllmEngine does with a broadcast, with the same Receiver."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], say: Say, stop: Callable[[], None] | None = None) -> None:
        """`stop`: called between two buffers of version STOPS_AT."""
        self.version = 0
        self.held = {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
        self.receiver = Receiver(torch.device("cpu"))
        self._say, self._stop = say, stop
        self._loads = 0
        """buffers of the version under way"""
        self._coming = -1

    async def handle_call(self, method: str, version: int, detail: Mapping[str, Any]) -> None:
        match method:
            case "init":
                self._say("joins", detail["size"])
                if not await asyncio.to_thread(self.receiver.join, Meeting(**detail)):
                    raise TransferEnded("no group")
            case "start":
                self._coming, self._loads = version, 0
            case "update":
                sent = [(name, dtype, shape) for name, dtype, shape in detail["broadcast"]]
                whole = await asyncio.to_thread(
                    lambda: self.receiver.receive(sent, self._load, packed_bytes=detail["packed_bytes"])
                )
                if not whole:
                    raise TransferEnded("ended on the way")
            case "finish":
                self.version = version

    def _load(self, some: Sequence[tuple[str, Tensor]]) -> None:
        self._loads += 1
        if self._stop is not None and (self._coming, self._loads) == (STOPS_AT, 2):
            self._stop()
        for name, tensor in some:
            self.held[name].copy_(tensor)


async def generate(engine: Engine, endpoint: str, name: str, say: Say, until: Callable[[], bool]) -> None:
    """Pull every version, and say which is held."""
    held = -1
    link = LinkSource(endpoint, name, way="nccl", workers=1, first_s=300.0, timeout_s=300.0)
    try:
        while not until():
            await link.pull_into(engine, first=held < 0)  # type: ignore[arg-type]
            if engine.version != held:
                held = engine.version
                say("holds", held, *sorted(fingerprint(engine.held, held).values()))
            await asyncio.sleep(0.01)
    finally:
        link.close()


def main(endpoint: str, name: str, stop: str, shapes: str) -> None:
    """As a process. `stop`: freezes, dies, or nothing."""
    import json

    def say(*words: object) -> None:
        print(*words, flush=True)

    def end() -> None:
        say(stop)
        os.kill(os.getpid(), signal.SIGSTOP if stop == "freezes" else signal.SIGKILL)

    receiver.MEET_S = 300.0  # however slow this machine is
    engine = Engine(json.loads(shapes), say, end if stop else None)
    asyncio.run(generate(engine, endpoint, name, say, lambda: False))


if __name__ == "__main__":
    main(*sys.argv[1:])
