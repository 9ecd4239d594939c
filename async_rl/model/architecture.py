"""The shape of a model, read from a Hugging Face config.json, and the memory that it takes. Imports no torch.

The bytes that a forward keeps for the backward pass are counted exactly as the decoder's operations save them (a test
counts the saved tensors); a GPU's fused norms keep a little less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, prod, sqrt
from typing import Any, Literal, get_args

from async_rl.errors import UserError, nearest

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[str, ...] = get_args(Family)
"""values of config.json's model_type that `Decoder` defines"""

ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> class name in config.json"""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""linear layers of every layer of `Decoder`"""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""of `Decoder`, by the names in config.json"""

FLOAT = 4
"""bytes of a float32"""
CHUNK_ELEMENTS = 1 << 22
"""logits that exist at a time (async_rl_kernels.logprob)"""
CHUNK_BUFFERS = 4
"""buffers of one chunk: logits, log-probs, probabilities, their gradient"""
KEPT_ELEMENTS = 1 << 25
"""logits that are kept on a CPU for the backward pass (async_rl_kernels.logprob.CPU_KEPT)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding, of one set of frequencies for sequences of every length.

    `llama3` is the scaling of Llama 3.1, `yarn` that of Peng et al. 2023, `linear` divides every frequency by `factor`.
    `longrope` has a second set for sequences beyond the original context; `rope_context` keeps every sequence of a run
    within it.
    Dynamic NTK scaling begins beyond max_position_embeddings, where no run goes: it is `default`.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    """context before it was extended (llama3, yarn), tokens"""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """the passage between both betas begins and ends at whole dimensions (yarn)"""
    short_factors: tuple[float, ...] = ()
    """of each frequency (longrope)"""
    attention_factor: float = 1.0
    """cosines and sines are multiplied by it (yarn, longrope)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder of one of the four families.

    Example: `DecoderConfig(family="qwen3", vocabulary=512, hidden=128, intermediate=384, layers=4,
    heads=4, kv_heads=2, head_dim=32, max_context=256, qk_norm=True, tied=True)`.
    """

    family: Family
    vocabulary: int
    """rows of the embedding"""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    """tokens"""
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    """the head is the embedding"""
    windows: tuple[int, ...] = ()
    """of each layer: the tokens that one attends to, itself among them; 0: all before it. Empty: 0 in every layer"""

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    @property
    def kv_width(self) -> int:
        """Numbers of one token in the KV cache: key and value of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def parse_config(values: Mapping[str, Any], *, where: str) -> DecoderConfig:
    """The decoder that a config.json describes. `where` names the file in messages.

    Both spellings of rotary settings are read: `rope_theta` with `rope_scaling` (transformers 4) and `rope_parameters`
    (transformers 5). Raises UserError for a feature that the decoder does not have.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    _refuse_unsupported(values, where)
    heads = _number(values, "num_attention_heads", where)
    hidden = _number(values, "hidden_size", where)
    bias = bool(values.get("attention_bias", False))
    config = DecoderConfig(
        family=family,
        vocabulary=_number(values, "vocab_size", where),
        hidden=hidden,
        intermediate=_number(values, "intermediate_size", where),
        layers=_number(values, "num_hidden_layers", where),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
        max_context=rope_context(values, int(values.get("max_position_embeddings") or 2048)),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope=_rope(values, where),
        qkv_bias=True if family == "qwen2" else bias and family != "mistral",
        output_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tied=bool(values.get("tie_word_embeddings", False)),
        windows=windows_of(values, where),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(
            f"{where}: {config.heads} heads do not share {config.kv_heads} key-value heads evenly, "
            f"or head_dim {config.head_dim} is odd"
        )
    if config.rope.kind == "longrope" and len(config.rope.short_factors) != config.head_dim // 2:
        raise UserError(
            f"{where}: short_factor has {len(config.rope.short_factors)} numbers; it needs one for each pair of "
            f"dimensions of a head, {config.head_dim // 2}"
        )
    return config


def check_targets(targets: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for a name in lora.targets that is not among the `known` linear layers."""
    for name in targets:
        if name not in known:
            raise UserError(f"lora.targets: {name!r} is no linear layer of this model; {nearest(name, known)}")


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its Hugging Face name; a linear weight is [out, in]."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocabulary, c.hidden)}
    for layer in range(c.layers):
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        linears: list[tuple[str, int, int, bool]] = [
            (at + "q_proj", q, c.hidden, c.qkv_bias),
            (at + "k_proj", kv, c.hidden, c.qkv_bias),
            (at + "v_proj", kv, c.hidden, c.qkv_bias),
            (at + "o_proj", c.hidden, q, c.output_bias),
            (mlp + "gate_proj", c.intermediate, c.hidden, c.mlp_bias),
            (mlp + "up_proj", c.intermediate, c.hidden, c.mlp_bias),
            (mlp + "down_proj", c.hidden, c.intermediate, c.mlp_bias),
        ]
        for name, rows, columns, bias in linears:
            shapes[name + ".weight"] = (rows, columns)
            if bias:
                shapes[name + ".bias"] = (rows,)
        if c.qk_norm:
            shapes[at + "q_norm.weight"] = shapes[at + "k_norm.weight"] = (c.head_dim,)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (c.hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (c.hidden,)
    shapes["model.norm.weight"] = (c.hidden,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocabulary, c.hidden)
    return shapes


def config_values(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of `config`, in the spelling that every transformers version reads."""
    rope = config.rope
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias and config.family != "qwen2",
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "rope_theta": rope.theta,
        "use_cache": True,
        "sliding_window": None,
        "torch_dtype": "float32",
    }
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if rope.kind != "default":
        values["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        values["rope_scaling"] |= {
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    return values


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    """UserError for features that would silently change the arithmetic."""
    act = values.get("hidden_act", "silu")
    if act != "silu":
        raise UserError(f"{where}: hidden_act {act!r} is not supported, only 'silu'")
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantised weights cannot be trained; use the unquantised checkpoint")


def windows_of(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Tokens that each layer of one of `FAMILIES` attends to, as transformers reads its settings; () where every layer
    attends to all. Raises UserError."""
    family = values["model_type"]
    if family == "llama":
        return ()
    layers = _number(values, "num_hidden_layers", where)
    on = family == "mistral" or bool(values.get("use_sliding_window", False))
    window = values.get("sliding_window", 4096) if on else None
    first = 0 if family == "mistral" else int(values.get("max_window_layers", 28))
    kinds = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if family != "mistral":
        kinds = values.get("layer_types") or kinds
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        what = f"it has {', '.join(unknown)}" if unknown else f"it has {len(kinds)}"
        raise UserError(
            f"{where}: layer_types must say full_attention or sliding_attention for each of {layers} layers; {what}"
        )
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        raise UserError(
            f"{where}: layer_types has sliding_attention, but sliding_window is {window!r} or use_sliding_window is "
            "false; set both, or make the layers full_attention"
        )
    found = tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    return found if any(found) else ()


def rope_settings(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rotary settings of a config.json in whichever spelling they are: one mapping, or one for each kind of layer.
    `rope_type` and `original_max_position_embeddings` (None: not named) are in each."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given |= values.get(key) or {}
    each = [inner for inner in given.values() if isinstance(inner, dict)] or [given]
    found = []
    for inner in each:
        kind = inner.get("rope_type") or inner.get("type") or "default"
        if kind in ("su", "yarn") and "short_factor" in inner:  # what Phi-3 called longrope first
            kind = "longrope"
        key = "original_max_position_embeddings"
        found.append(inner | {"rope_type": kind, key: values.get(key) or inner.get(key)})
    return found


def rope_context(values: Mapping[str, Any], most: int) -> int:
    """Tokens of a sequence, at most `most`, within which its frequencies do not depend on its length.

    longrope chooses other ones for sequences beyond the original context: transformers by the longest position of a
    call, vLLM by the longest that a run allows. A sequence that grows past it, as in generation, has no log-probs that
    a forward over the whole would find again.
    """
    ends = [
        int(g["original_max_position_embeddings"] or most)
        for g in rope_settings(values)
        if g["rope_type"] == "longrope"
    ]
    return min([most, *ends])


def _rope(values: Mapping[str, Any], where: str) -> Rope:
    given, *others = rope_settings(values)
    kind: Any = given["rope_type"]
    if kind not in ROPE_TYPES or others:
        what = "one for each kind of layer" if others else repr(kind)
        raise UserError(f"{where}: rope type {what} is not supported; {', '.join(ROPE_TYPES)} are")
    if float(given.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    most = int(values.get("max_position_embeddings") or 2048)
    original = int(given["original_max_position_embeddings"] or values.get("max_position_embeddings") or 8192)
    theta = float(given.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    if kind in ("default", "dynamic"):
        return Rope(theta=theta)
    if kind in ("yarn", "longrope"):
        factor = float(given.get("factor") or most / original)
        chosen = Rope(theta=theta, kind=kind, factor=factor, original_context=original)
        return _with_attention_factor(chosen, given, where)
    return Rope(
        theta=theta,
        kind=kind,
        factor=float(given.get("factor", 1.0)),
        low_frequency_factor=float(given.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(given.get("high_freq_factor", 4.0)),
        original_context=original if kind == "llama3" else 8192,
    )


def _with_attention_factor(rope: Rope, given: Mapping[str, Any], where: str) -> Rope:
    """A yarn or longrope with what only they have, as transformers' modeling_rope_utils reads it."""

    def scale(by: float) -> float:
        return 0.1 * by * log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    found: float | None = given.get("attention_factor")
    if rope.kind == "longrope":
        factors = given.get("short_factor")
        if not isinstance(factors, list) or not factors:
            raise UserError(f"{where}: rope type 'longrope' needs short_factor, a list of numbers")
        if found is None:
            found = sqrt(1 + log(rope.factor) / log(rope.original_context)) if rope.factor > 1 else 1.0
        return replace(rope, short_factors=tuple(map(float, factors)), attention_factor=float(found))
    if found is None:
        all_dims, some = given.get("mscale_all_dim"), given.get("mscale")
        found = scale(some) / scale(all_dims) if some and all_dims else scale(1.0)
    return replace(
        rope,
        attention_factor=float(found),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
    )


def _number(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key} must be a positive whole number, it is {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes kept for the backward pass, for each token."""

    layer: int
    """of one layer, its input included"""
    boundary: int
    """of a layer's input alone, which is all that activation checkpointing keeps of a layer"""
    rest: int
    """outside the layers"""


def kept_bytes(c: DecoderConfig, *, bfloat16: bool, packed: bool) -> Kept:
    """Bytes that the decoder keeps for each token. `bfloat16`: under autocast, with float32 weights; `packed`: several
    documents, padded together by length (CPU)."""
    item = 2 if bfloat16 else FLOAT
    query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    # Norms keep input and scaled row in float32; under autocast each linear also keeps a cast copy.
    norms = 2 * c.hidden * FLOAT + 5 * c.hidden * item if bfloat16 else 4 * c.hidden * FLOAT
    head_norms = (query + kv) * FLOAT if c.qk_norm else 0
    attention = (2 * query + 2 * kv + (query if packed else 0)) * item
    statistics = FLOAT * (2 + c.heads + (c.heads + c.kv_heads if c.qk_norm else 0))
    layer = norms + head_norms + attention + 4 * c.intermediate * item + statistics
    rest = c.hidden * FLOAT + FLOAT + 2 * c.head_dim * FLOAT + 8  # last norm, positions as cos and sin, the token
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
    """Bytes kept for the backward pass of a micro-batch of `tokens` by torch's own operations; compiled ones keep less
    (model/compiled_layer.py). With checkpointing: every layer's input, and one layer whole.

    `sharded`: weights are gathered layer by layer in bfloat16, so autocast keeps no copies of them."""
    kept = kept_bytes(c, bfloat16=bfloat16, packed=packed)
    layers = c.layers * kept.boundary + kept.layer if checkpointing else c.layers * kept.layer
    if not bfloat16 or sharded:
        return tokens * (layers + kept.rest)
    copies = c.layers * layer_parameters(c, matrices=True)  # autocast's, of the weights
    return tokens * (layers + kept.rest) + 2 * copies


def log_prob_bytes(c: DecoderConfig, tokens: int) -> int:
    """Bytes for the log-probs of `tokens` policy tokens: their hidden states with gradient, one chunk of logits, all of
    them where they are few, and the head's gradient before it is added."""
    rows = min(tokens, max(1, CHUNK_ELEMENTS // c.vocabulary))
    kept = tokens * c.vocabulary if tokens * c.vocabulary <= KEPT_ELEMENTS else 0
    return FLOAT * (3 * tokens * c.hidden + CHUNK_BUFFERS * rows * c.vocabulary + kept + c.vocabulary * c.hidden)


def layer_parameters(c: DecoderConfig, *, matrices: bool = False) -> int:
    """Number of parameters of one layer, or of its matrices alone."""
    shapes = [shape for name, shape in tensor_shapes(c).items() if name.startswith("model.layers.0.")]
    return sum(prod(shape) for shape in shapes if len(shape) > 1 or not matrices)


def layer_width(c: DecoderConfig) -> int:
    """Inputs and outputs of the matrices of one layer, together: numbers a token."""
    shapes = [shape for name, shape in tensor_shapes(c).items() if name.startswith("model.layers.0.")]
    return sum(sum(shape) for shape in shapes if len(shape) > 1)


def parameters(c: DecoderConfig) -> int:
    """Number of parameters of the model."""
    return sum(prod(shape) for shape in tensor_shapes(c).values())


def lora_parameters(c: DecoderConfig, rank: int, targets: tuple[str, ...] = ()) -> int:
    """Number of parameters of adapters of `rank` on the linear layers `targets` (last parts of their names; empty:
    all)."""
    shapes = [
        shape
        for name, shape in tensor_shapes(c).items()
        if name.startswith("model.layers.") and name.endswith("_proj.weight")
        and (not targets or name.split(".")[-2] in targets)
    ]  # fmt: skip
    return sum(rank * sum(shape) for shape in shapes)


def kv_cache_bytes(c: DecoderConfig, tokens: int, item_bytes: int) -> int:
    """Bytes of the keys and values of `tokens` in all layers."""
    return tokens * c.kv_width * item_bytes


def micro_batch_that_fits(
    c: DecoderConfig, room_bytes: int, *, bfloat16: bool, checkpointing: bool = False, sharded: bool = False
) -> int:
    """Tokens of the largest micro-batch, in multiples of 256, whose activations and log-probs fit; 0 if none does."""
    low, high = 0, 1 << 16
    while low < high:
        middle = (low + high + 1) // 2
        tokens = 256 * middle
        kept = activation_bytes(c, tokens, bfloat16=bfloat16, checkpointing=checkpointing, sharded=sharded)
        needed = kept + log_prob_bytes(c, tokens)
        low, high = (middle, high) if needed <= room_bytes else (low, middle - 1)
    return 256 * low


def plain_name(name: str) -> str:
    """A parameter's name without peft's insertion."""
    return name.replace(".base_layer.", ".")
