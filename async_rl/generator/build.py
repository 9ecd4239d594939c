"""From settings to an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from async_rl.errors import UserError
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.model.decoder import DTYPES
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.settings import Settings
from async_rl.weights.client import WeightStream
from async_rl.weights.shared_memory import WeightReader
from async_rl.wire.keys import keys_in


class WeightSource(Protocol):
    """Where a generator gets its weights."""

    def read(self) -> tuple[int, dict[str, torch.Tensor]]:
        """The newest version, or one newer than was read last. Raises WeightsError."""
        ...

    def close(self) -> None: ...


def make_weights(settings: Settings, segment: Path, endpoint: str, identity: str, *, here: bool) -> WeightSource:
    """By `weights.transport`. `segment`: the trainer's; `endpoint`: of the weight server, empty when there is none;
    `here`: the segment is, or will be, on this host. Raises UserError when there is no way."""
    transport = settings.weights.transport
    keys = keys_in(settings.wire.keys)
    if transport == "shared_memory" or (transport == "auto" and here):
        if not here:
            raise UserError(f"weights.transport is shared_memory, but {segment} is not on this host; leave it out")
        return WeightReader(segment)
    if not endpoint or keys is None:
        raise UserError(
            "the weights of this run cannot be had here: it has no weight server, which only runs with a tcp endpoint; "
            "start the run with wire.endpoint=tcp://HOST:PORT"
        )
    return WeightStream(endpoint, f"{identity}/weights", keys=keys, timeout_s=settings.wire.timeout_s)


def make_engine(settings: Settings, tokenizer: Tokenizer) -> Engine:
    """The engine of `generator.engine` on the model of `model.path`. Raises UserError."""
    chosen = settings.generator
    torch.set_num_threads(chosen.threads)
    model = load_model(Path(settings.model.path), dtype=DTYPES[chosen.dtype], device=chosen.device)
    return EmbeddedEngine(
        model,
        tokenizer,
        max_sequences=chosen.max_sequences,
        max_context=chosen.max_context or None,
        kv_on_update=chosen.kv_on_update,
        device=chosen.device,
        dtype=DTYPES[chosen.dtype],
    )
