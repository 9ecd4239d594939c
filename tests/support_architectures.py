"""Tiny random models of the architectures that docs/architectures.md lists, and what each can do there.

The cells are claims: tests/model/test_architectures.py tries every one that it does not say "by hand" or "not tried"
of, and holds the page's table to `table()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from async_rl.model.create import write_character_tokenizer
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ORIGINAL = 48
"""tokens of the context before longrope and yarn extended it"""
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 5.0, 6.0, 7.0], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
WINDOW = 8
"""tokens; documents in the tests are longer"""

LENGTHS = (40, 7, 25, 47)
"""of documents; longer than windows, and up to the context before an extension"""

Cell = Literal["yes", "refused", "attention only", "by hand", "not tried"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the table."""

    name: str
    """as the page says it"""
    config: str
    """transformers' class"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """from SHAPE; None takes a key away"""
    built_in: bool = False
    """computed by the built-in decoder, not by transformers"""
    context: int = 128
    """longest sequence that a run may have, tokens"""
    lora: Cell = "yes"
    exact: Cell = "refused"
    vllm: Cell = "by hand"
    stacked: bool = False
    """has experts in stacked parameters"""

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in (SHAPE | dict(self.changes)).items() if value is not ...}


NO_HEAD_DIM = {"head_dim": ...}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SOME_LAYERS = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2}
GEMMA = {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}
CAPPED = {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0}
LONG_PHI = {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def built_in(name: str, config: str, *, vllm: Cell = "by hand", context: int = 128, **changes: Any) -> Architecture:
    return Architecture(
        name=name, config=config, changes=changes, built_in=True, exact="yes", vllm=vllm, context=context
    )


def foreign(name: str, config: str, *, context: int = 128, vllm: Cell = "by hand", **changes: Any) -> Architecture:
    return Architecture(name=name, config=config, changes=changes, context=context, vllm=vllm)


def experts(name: str, config: str, **changes: Any) -> Architecture:
    return Architecture(name=name, config=config, changes=changes, stacked=True, lora="attention only", vllm="refused")


ROWS = (
    built_in("Llama 2, 3, SmolLM2", "LlamaConfig"),
    built_in("Llama 3.1 (rope `llama3`)", "LlamaConfig", rope_parameters=LLAMA3),
    built_in("Llama, rope `linear`", "LlamaConfig", rope_parameters=LINEAR),
    built_in("Llama, rope `dynamic`", "LlamaConfig", rope_parameters=DYNAMIC),
    built_in("Llama, rope `longrope`", "LlamaConfig", rope_parameters=LONGROPE, context=ORIGINAL),
    built_in("Mistral (sliding window)", "MistralConfig", sliding_window=WINDOW),
    built_in("Qwen2, Qwen2.5", "Qwen2Config", tie_word_embeddings=True, **NO_HEAD_DIM),
    built_in("Qwen2, some layers with a window", "Qwen2Config", vllm="refused", **SOME_LAYERS, **NO_HEAD_DIM),
    built_in("Qwen3", "Qwen3Config", vllm="yes", tie_word_embeddings=True),
    built_in("Qwen2.5, Qwen3, rope `yarn`", "Qwen3Config", rope_parameters=YARN),
    foreign("Gemma 2", "Gemma2Config", **GEMMA, **CAPPED),
    foreign("Gemma 3 (text)", "Gemma3TextConfig", vllm="yes", **GEMMA, sliding_window_pattern=2),
    foreign("Phi-3 mini 4k (sliding window)", "Phi3Config", sliding_window=WINDOW, **NO_HEAD_DIM),
    foreign("Phi-3 128k, Phi-4 mini (rope `longrope`)", "Phi3Config", context=ORIGINAL, **LONG_PHI, **NO_HEAD_DIM),
    foreign("Phi-4", "Phi3Config", **NO_HEAD_DIM),
    experts("Qwen3-MoE", "Qwen3MoeConfig", **EXPERTS),
    experts("Mixtral", "MixtralConfig", num_local_experts=4, sliding_window=None),
    foreign("Granite", "GraniteConfig", logits_scaling=2.0, attention_multiplier=0.5, **NO_HEAD_DIM),
    foreign("Cohere", "CohereConfig", logit_scale=0.5, **NO_HEAD_DIM),
    foreign("OLMo 2", "Olmo2Config", vllm="not tried", **NO_HEAD_DIM),
    foreign("SmolLM3", "SmolLM3Config", vllm="not tried", **NO_HEAD_DIM),
    foreign("GPT-NeoX, Pythia", "GPTNeoXConfig", vllm="not tried", num_key_value_heads=..., **NO_HEAD_DIM),
)

TWO_PARTS = {
    **dict.fromkeys(SHAPE, ...),
    "text_config": SHAPE,
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}
LATENT = {
    "head_dim": ..., "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An architecture that cannot be right here."""

    name: str
    because: str
    """as the page says it"""
    config: str
    """transformers' class"""
    changes: Mapping[str, Any] = field(default_factory=dict)
    at_once: str
    """in what is said before anything starts"""
    later: str
    """in what the proof at load time would say if the architecture was not listed"""


REFUSED = (
    Refusal(
        name="gpt-oss", because="attention has sinks", config="GptOssConfig", changes={"num_local_experts": 4},
        at_once="attention has sinks", later="attention sinks",
    ),
    Refusal(
        name="DeepSeek V2, V3", because="keys and values have unequal sizes (latent attention)",
        config="DeepseekV3Config", changes=LATENT, at_once="unequal sizes", later="unequal sizes",
    ),
    Refusal(
        name="Mamba, RecurrentGemma, Jamba, RWKV, Qwen3-Next", because="layers are recurrent: keys and values are not "
        "all that they remember", config="MambaConfig", at_once="its layers are recurrent", later="cannot honour",
    ),
    Refusal(
        name="BLOOM, MPT", because="positions are added to scores (ALiBi)", config="BloomConfig",
        changes={"n_head": 4, "n_layer": 2}, at_once="ALiBi", later="cannot honour",
    ),
    Refusal(
        name="Phi-1, Phi-2", because="the head has a bias", config="PhiConfig", changes=NO_HEAD_DIM,
        at_once="its head has a bias", later="head with bias",
    ),
    Refusal(
        name="models of several parts, such as text and images", because="only a language model alone can be "
        "trained; `async-rl import-model` takes that of Gemma 3 with images out", config="Gemma3Config",
        changes=TWO_PARTS, at_once="several parts", later="several parts",
    ),
    Refusal(
        name="Llama 4", because="attention is cut into chunks (`attention_chunk_size`)", config="Llama4TextConfig",
        at_once="attention_chunk_size", later="attention_chunk_size",
    ),
)  # fmt: skip


def write_architecture(
    folder: Path, config: str, changes: Mapping[str, Any], *, seed: int = 0, wide: bool = False
) -> Path:
    """A folder with a random model whose distributions are far from uniform. `wide`: heads of 32, which vLLM's CPU
    kernels need."""
    import transformers

    torch.manual_seed(seed)
    values = {key: value for key, value in (SHAPE | dict(changes)).items() if value is not ...}
    if wide:
        values |= {"hidden_size": 128} | ({"head_dim": 32} if "head_dim" in values else {})
        rope = values.get("rope_parameters", {})
        longer = {key: [x for x in value for _ in range(4)] for key, value in rope.items() if isinstance(value, list)}
        if longer:
            values["rope_parameters"] = rope | longer
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**values)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = (0.15 if wide else 0.3) if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    write_character_tokenizer(folder, "".join(map(chr, range(33, 126))))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def write_row(folder: Path, row: Architecture, *, seed: int = 0, wide: bool = False) -> Path:
    return write_architecture(folder, row.config, row.changes, seed=seed, wide=wide)


def documents(vocabulary: int = 94) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=random) for length in LENGTHS]


def episode(number: int, document: Tensor) -> Trajectory:
    """All but three tokens are sampled."""
    length = len(document)
    return Trajectory(
        group=0, sample=number, problem=0, split="train", seed=0, tokens=document.numpy().astype(np.int32),
        log_behaviour=np.zeros(length, np.float32), turns=(Turn(start=3, length=length - 3),),
        versions=(VersionSpan(version=0, start=3, end=length),), reward=float(number), ended="finished",
    )  # fmt: skip


def batch() -> PackedBatch:
    """The documents in one micro-batch."""
    return pack_batch([episode(*pair) for pair in enumerate(documents())], micro_batch_tokens=10_000)


def table() -> str:
    """The page's table."""
    columns = (
        "architecture", "computed by", "embedded engine", "trainer", "packing", "longest sequence", "LoRA",
        "exact OPOB", "vLLM", "sharding",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in ROWS:
        by = "built-in decoder" if row.built_in else "transformers"
        context = "the model's" if row.context == SHAPE["max_position_embeddings"] else "the original context"
        lines.append(
            f"| {row.name} | {by} | yes | yes | yes | {context} | {row.lora} | {row.exact} | {row.vllm} | yes |"
        )
    return "\n".join(lines) + "\n"


def refusals() -> str:
    """The page's table of what is refused."""
    lines = ["| architecture | because |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row.name} | {row.because} |" for row in REFUSED)]) + "\n"
