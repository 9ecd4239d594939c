"""From settings to an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.model.decoder import DTYPES
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.settings import Settings


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
