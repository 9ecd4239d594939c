"""Bytes that training and serving a decoder take, from its shape. Pure; torch is not imported.

What a forward keeps for the backward pass is counted exactly as the decoder's operations save it (a test counts the
saved tensors); a GPU's fused norms keep a little less.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from async_rl.model.architecture import DecoderConfig, tensor_shapes

FLOAT = 4
"""bytes of a float32"""
CHUNK_ELEMENTS = 1 << 22
"""logits that exist at a time (async_rl_kernels.logprob)"""
CHUNK_BUFFERS = 4
"""logits, log-probs, probabilities, their gradient"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes kept for the backward pass, a token."""

    layer: int
    """of one layer, its input among them"""
    boundary: int
    """a layer's input alone: what activation checkpointing keeps of each layer"""
    rest: int
    """outside the layers"""


def kept_bytes(c: DecoderConfig, *, bfloat16: bool, packed: bool) -> Kept:
    """`bfloat16`: under autocast, weights float32; `packed`: several documents, laid together by length (CPU)."""
    item = 2 if bfloat16 else FLOAT
    query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # Norms: input, normed and scaled row each in float32; under autocast each linear keeps a cast copy of its own.
    norms = 4 * c.hidden * FLOAT + 5 * c.hidden * item if bfloat16 else 6 * c.hidden * FLOAT
    head_norms = 2 * (query + kv) * FLOAT if c.qk_norm else 0
    attention = (2 * query + 2 * kv + (query if packed else 0)) * item
    statistics = FLOAT * (2 + c.heads + (c.heads + c.kv_heads if c.qk_norm else 0))
    layer = norms + head_norms + attention + 4 * c.intermediate * item + statistics
    rest = 2 * c.hidden * FLOAT + FLOAT + 2 * c.head_dim * FLOAT + 8  # last norm, positions as cos and sin, the token
    return Kept(layer=layer, boundary=c.hidden * FLOAT, rest=rest)


def activation_bytes(
    c: DecoderConfig,
    tokens: int,
    *,
    bfloat16: bool,
    packed: bool = True,
    checkpointing: bool = False,
    sharded: bool = False,
) -> int:
    """Kept for the backward pass of one micro-batch. With checkpointing: every layer's input, and one layer whole.
    `sharded`: weights are gathered layer by layer in bfloat16, so autocast keeps no copies of them."""
    kept = kept_bytes(c, bfloat16=bfloat16, packed=packed)
    layers = c.layers * kept.boundary + kept.layer if checkpointing else c.layers * kept.layer
    if not bfloat16 or sharded:
        return tokens * (layers + kept.rest)
    copies = c.layers * layer_parameters(c, matrices=True)  # autocast's, of the weights
    return tokens * (layers + kept.rest) + 2 * copies


def log_prob_bytes(c: DecoderConfig, tokens: int) -> int:
    """Log-probs of `tokens` policy tokens: their hidden states with gradient, one chunk of logits, and the head's
    gradient before it is added."""
    rows = min(tokens, max(1, CHUNK_ELEMENTS // c.vocabulary))
    return FLOAT * (3 * tokens * c.hidden + CHUNK_BUFFERS * rows * c.vocabulary + c.vocabulary * c.hidden)


def layer_parameters(c: DecoderConfig, *, matrices: bool = False) -> int:
    """Of one layer; of its matrices alone."""
    shapes = [shape for name, shape in tensor_shapes(c).items() if name.startswith("model.layers.0.")]
    return sum(prod(shape) for shape in shapes if len(shape) > 1 or not matrices)


def parameters(c: DecoderConfig) -> int:
    return sum(prod(shape) for shape in tensor_shapes(c).values())


def lora_parameters(c: DecoderConfig, rank: int, targets: tuple[str, ...] = ()) -> int:
    """Of adapters of `rank` at the linear layers named (by the last part of their names; none: all of them)."""
    shapes = [
        shape
        for name, shape in tensor_shapes(c).items()
        if name.startswith("model.layers.") and name.endswith("_proj.weight")
        and (not targets or name.split(".")[-2] in targets)
    ]  # fmt: skip
    return sum(rank * sum(shape) for shape in shapes)


def kv_cache_bytes(c: DecoderConfig, tokens: int, item_bytes: int) -> int:
    """Keys and values of all layers."""
    return tokens * c.kv_width * item_bytes


def micro_batch_that_fits(
    c: DecoderConfig, room_bytes: int, *, bfloat16: bool, checkpointing: bool = False, sharded: bool = False
) -> int:
    """Tokens of the largest micro-batch, in multiples of 256, whose activations and log-probs fit; 0: none does."""
    low, high = 0, 1 << 16
    while low < high:
        middle = (low + high + 1) // 2
        tokens = 256 * middle
        kept = activation_bytes(c, tokens, bfloat16=bfloat16, checkpointing=checkpointing, sharded=sharded)
        needed = kept + log_prob_bytes(c, tokens)
        low, high = (middle, high) if needed <= room_bytes else (low, middle - 1)
    return 256 * low
