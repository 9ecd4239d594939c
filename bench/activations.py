"""Memory of forward and backward with every activation kept, and with layers computed again. Exact, not timed.

    python bench/activations.py

The most that torch held during forward and backward of one packed micro-batch above what was there before (so
without weights, with gradients), from the allocation events of its profiler, on the CPU in float32; and the same
less the gradients, which both have. `again` runs each layer's forward twice: a third more arithmetic.
Adapters (LoRA, rank 8) keep the activations and have nearly no gradients.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from opob import make_batch, make_model, step_peak

from async_rl.model.decoder import Decoder, LayerExecution
from async_rl.model.lora import add_adapters
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch

CASES: dict[str, dict[str, Any]] = {
    "8 layers of 256, 2500 tokens": {"layers": 8, "hidden": 256, "intermediate": 768, "heads": 4, "trajectories": 16},
    "24 layers of 128, 2500 tokens": {"layers": 24, "hidden": 128, "intermediate": 384, "heads": 4, "trajectories": 16},
}
SHAPE: dict[str, Any] = {"vocabulary": 512, "prompt": (28, 41), "turns": (1, 2), "answer": (100, 160), "reply": 0}


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({name: measure(SHAPE | case) for name, case in CASES.items()}, indent=2))


def measure(case: dict[str, Any]) -> dict[str, Any]:
    model, batch = make_model(case), make_batch(case, 1 << 20)
    weights = 4 * sum(p.numel() for p in model.parameters())
    kept, again = both(model, batch)
    add_adapters(model, rank=8, alpha=16.0)
    with_adapters = both(model, batch)
    return {
        "tokens": batch.num_tokens,
        "weights_mb": round(weights / 1e6, 1),
        "kept_mb": round(kept / 1e6, 1),
        "again_mb": round(again / 1e6, 1),
        "share_without_gradients": round((again - weights) / (kept - weights), 3),
        "lora_kept_mb": round(with_adapters[0] / 1e6, 1),
        "lora_again_mb": round(with_adapters[1] / 1e6, 1),
    }


def both(model: Decoder, batch: PackedBatch) -> tuple[int, int]:
    def step() -> None:
        log_probs(model, batch.micro_batches[0], ModelArithmetic(temperature=1.0)).log_prob.sum().backward()

    model.set_execution(LayerExecution())
    kept = step_peak(model, step)
    model.set_execution(LayerExecution(checkpointed=True))
    return kept, step_peak(model, step)


if __name__ == "__main__":
    main()
