"""A vLLM on the CPU for tests, and the numbers it must give."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from support_models import make_decoder, qwen3_config

from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder

TOLERANCE = 1e-4
CONTEXT = 128
CONFIG = qwen3_config(hidden=64, head_dim=32)  # vLLM's attention on a CPU knows no smaller heads
Result = TypeVar("Result")


class Served:
    """An engine on an event loop of its own, asked from the tests' thread."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        """`changes`: of VllmOptions."""
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.engine = self.run(self._make(folder, changes), 900.0)  # half a minute on an idle machine
        self.models = {0: make_decoder(CONFIG, 0)}

    async def _make(self, folder: Path, changes: dict[str, Any]) -> Any:
        from async_rl.generator.vllm_engine import VllmEngine, VllmOptions

        given: dict[str, Any] = {
            "model": folder,
            "max_sequences": 16,
            "max_context": CONTEXT,
            "dtype": "float32",
            "device": "cpu",
            "kv_on_update": "recompute",
            "kv_cache_bytes": 64 << 20,
            "memory_share": 0.9,
            "tensor_parallel": 1,
            "layout": {name: tuple(p.shape) for name, p in make_decoder(CONFIG).named_parameters()},
        }
        return VllmEngine.start(VllmOptions(**given | changes))

    def run(self, work: Coroutine[Any, Any, Result], seconds: float = 600.0) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def ask(self, requests: Sequence[Request]) -> list[Completion]:
        async def all_at_once() -> list[Completion]:
            return await asyncio.gather(*(self.engine.generate(request) for request in requests))

        return self.run(all_at_once())

    async def load(self, version: int) -> None:
        """Other weights, known by their version."""
        self.models[version] = make_decoder(CONFIG, version)
        await self.engine.load({n: p.detach() for n, p in self.models[version].named_parameters()}, version)

    @property
    def model(self) -> Decoder:
        return self.models[self.engine.version]


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 40, length).tolist()


def ask(session: int, tokens: Sequence[int], max_tokens: int = 12, **params: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Request(session=session, tokens=tokens, params=sampling, seed=1000 + session)


def clean(model: Decoder, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-prob of tokens[1:], by the trainer's forward."""
    ids = torch.tensor(list(tokens))
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), DocumentAttention([len(ids)]))
        log_probs = torch.log_softmax(hidden @ model.head.T / temperature, -1)
    return log_probs[:-1].gather(1, ids[1:, None]).squeeze(1).numpy()
