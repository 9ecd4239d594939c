"""The shape of a model, read from a Hugging Face config.json, and the memory that it takes. Imports no torch.

The bytes that a forward keeps for the backward pass are counted exactly as the decoder's operations save them (a test
counts the saved tensors); a GPU's fused norms keep a little less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
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

FLOAT = 4
"""bytes of a float32"""
CHUNK_ELEMENTS = 1 << 22
"""logits that exist at a time (async_rl_kernels.logprob)"""
CHUNK_BUFFERS = 4
"""buffers of one chunk: logits, log-probs, probabilities, their gradient"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding. `llama3` is the scaling of Llama 3.1; `linear` divides every frequency by `factor`."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    """context before it was extended (llama3), tokens"""


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
        max_context=int(values.get("max_position_embeddings") or 2048),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope=_rope(values, where),
        qkv_bias=True if family == "qwen2" else bias and family != "mistral",
        output_bias=bias and family in ("llama", "qwen3"),
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tied=bool(values.get("tie_word_embeddings", False)),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(
            f"{where}: {config.heads} heads do not share {config.kv_heads} key-value heads evenly, "
            f"or head_dim {config.head_dim} is odd"
        )
    return config


def context_of(asked: int, config: DecoderConfig | None) -> int:
    """Most tokens of a sequence: `asked`, else the model's own limit; 0 when it is not known."""
    return asked or (config.max_context if config is not None else 0)


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
    layer_types = values.get("layer_types") or []
    sliding = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if any(kind != "full_attention" for kind in layer_types):
        raise UserError(f"{where}: layer_types has {sorted(set(layer_types))}; only full_attention is supported")
    if sliding is not None and not layer_types:
        raise UserError(f"{where}: sliding_window {sliding} is not supported; set it to null to attend to everything")
    act = values.get("hidden_act", "silu")
    if act != "silu":
        raise UserError(f"{where}: hidden_act {act!r} is not supported, only 'silu'")
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantised weights cannot be trained; use the unquantised checkpoint")


def _rope(values: Mapping[str, Any], where: str) -> Rope:
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given |= values.get(key) or {}
    kind: Any = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported (default, linear, llama3 are)")
    if float(given.get("partial_rotary_factor", values.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    original = given.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 8192
    theta = given.get("rope_theta") or values.get("rope_theta") or 10_000.0
    return Rope(
        theta=float(theta),
        kind=kind,
        factor=float(given.get("factor", 1.0)),
        low_frequency_factor=float(given.get("low_freq_factor", 1.0)),
        high_frequency_factor=float(given.get("high_freq_factor", 4.0)),
        original_context=int(original) if kind == "llama3" else 8192,
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
    # Norms keep input, normed and scaled row in float32; under autocast each linear also keeps a cast copy.
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
    """Bytes kept for the backward pass of a micro-batch of `tokens`. With checkpointing: every layer's input, and one
    layer whole. `sharded`: weights are gathered layer by layer in bfloat16, so autocast keeps no copies of them."""
    kept = kept_bytes(c, bfloat16=bfloat16, packed=packed)
    layers = c.layers * kept.boundary + kept.layer if checkpointing else c.layers * kept.layer
    if not bfloat16 or sharded:
        return tokens * (layers + kept.rest)
    copies = c.layers * layer_parameters(c, matrices=True)  # autocast's, of the weights
    return tokens * (layers + kept.rest) + 2 * copies


def log_prob_bytes(c: DecoderConfig, tokens: int) -> int:
    """Bytes for the log-probs of `tokens` policy tokens: their hidden states with gradient, one chunk of logits, and
    the head's gradient before it is added."""
    rows = min(tokens, max(1, CHUNK_ELEMENTS // c.vocabulary))
    return FLOAT * (3 * tokens * c.hidden + CHUNK_BUFFERS * rows * c.vocabulary + c.vocabulary * c.hidden)


def layer_parameters(c: DecoderConfig, *, matrices: bool = False) -> int:
    """Number of parameters of one layer, or of its matrices alone."""
    shapes = [shape for name, shape in tensor_shapes(c).items() if name.startswith("model.layers.0.")]
    return sum(prod(shape) for shape in shapes if len(shape) > 1 or not matrices)


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
