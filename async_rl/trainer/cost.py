"""What a trajectory costs the model of a folder, for laying batches over ranks.

Per token 2 x the elements of the layers' matrices, per predicted token 2 x those of the head, and per pair of
a token and one it sees 4 x layers x heads x head_dim (score and value). For Qwen2.5-7B a pair costs 0.4 M
operations and a token 13 G: attention is as dear as the matrices at 65,000 tokens, a tenth at 6,500.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_rl.batch.spread import Cost
from async_rl.model.architecture import DecoderConfig, tensor_shapes
from async_rl.model.folder import CONFIG, existing, read_config, read_json


def model_cost(path: str | Path) -> Cost:
    """From config.json alone. Of an architecture left to transformers it is an estimate: dense SwiGLU layers
    of the sizes that its config names. It decides who does what, never a result."""
    config = read_config(path)
    if config is None:
        return _estimate(read_json(existing(path) / CONFIG))
    return decoder_cost(config)


def decoder_cost(config: DecoderConfig) -> Cost:
    """Exact."""
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )
    return Cost(
        per_token=2 * matrices,
        per_policy_token=2 * config.vocabulary * config.hidden,
        per_pair=4 * config.layers * config.heads * config.head_dim,
    )


def _estimate(values: Mapping[str, Any]) -> Cost:
    values = values.get("text_config") or values

    def number(*names: str, default: int) -> int:
        return next((int(values[name]) for name in names if isinstance(values.get(name), int)), default)

    hidden = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", default=1)
    heads = number("num_attention_heads", "n_head", default=1)
    width = heads * number("head_dim", default=hidden // heads)
    narrow = width * number("num_key_value_heads", default=heads) // heads
    inner = number("intermediate_size", "n_inner", default=4 * hidden)
    return Cost(
        per_token=2 * layers * hidden * (2 * width + 2 * narrow + 3 * inner),
        per_policy_token=2 * hidden * number("vocab_size", default=1),
        per_pair=4 * layers * width,
    )
