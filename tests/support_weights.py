"""Published weights and a weight server, for the tests of what carries them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from async_rl.weights import WeightReader
from async_rl.weights.relay_tree import RelayTree
from async_rl.weights.shared_memory import TensorPlace, WeightCopy, layout_to_json
from async_rl.weights.stream import Intake, Relays, Shelf, answer
from async_rl.wire.channel import Router
from async_rl.wire.keys import Keys

CHUNK = 16


def content(version: int, size: int) -> np.ndarray:
    return np.random.default_rng(version).integers(0, 256, size, dtype=np.uint8)


@dataclass
class Segment:
    """What a trainer publishes; only the newest version can be copied, and not always."""

    size: int
    newest: int = -1
    busy: int = 0
    """copies that fail because the trainer writes"""

    def latest(self) -> int:
        return self.newest

    def take(self) -> WeightCopy | None:
        if self.newest < 0 or self.busy > 0:
            self.busy -= 1
            return None
        layout = layout_to_json([TensorPlace(name="w", dtype="uint8", shape=(self.size,), offset=0)])
        return WeightCopy(version=self.newest, layout=layout, content=content(self.newest, self.size))


SOON_S = 30.0


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(700, 300, generator=generator),
        "norm": torch.randn(7, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([seed]),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@contextmanager
def served(path: Path, keys: Keys, intake: Intake | None = None) -> Iterator[str]:
    """The endpoint of a weight server on a thread; `intake`: of versions that a trainer elsewhere sends."""
    over, endpoint, ready = threading.Event(), [""], threading.Event()

    def serve() -> None:
        with Router("tcp://:*", keys=keys) as router, WeightReader(path) as reader:
            endpoint[0] = router.endpoint
            ready.set()
            shelf = Shelf(reader.latest, reader.copy, chunk_bytes=100_000)
            relays = Relays(RelayTree())
            while not over.is_set():
                answer(router, shelf, relays, intake)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(SOON_S)
        yield endpoint[0]
    finally:
        over.set()
        thread.join()
