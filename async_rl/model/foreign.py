"""What a config.json of an architecture that transformers defines asks for, read without torch and transformers.

Only what a short proof at load time would not show, or what would be found too late, is judged here. Everything else is
proved when the model is loaded: our call has to compute transformers' own logits (model/huggingface.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from async_rl.errors import UserError
from async_rl.model.architecture import rope_context, rope_settings, windows_of

STACKED = re.compile(r"\.experts\.(\d+\.)?")
"""in the stored name of a weight of an expert, which transformers holds as a part of one stacked parameter"""


REFUSED: Mapping[str, str] = {
    "bloom": "positions are added to scores (ALiBi)",
    "deepseek_v2": "keys and values have unequal sizes (latent attention)",
    "deepseek_v3": "keys and values have unequal sizes (latent attention)",
    "falcon_mamba": "its layers are recurrent",
    "gpt_oss": "attention has sinks",
    "jamba": "its layers are recurrent",
    "mamba": "its layers are recurrent",
    "mamba2": "its layers are recurrent",
    "mpt": "positions are added to scores (ALiBi)",
    "phi": "its head has a bias",
    "qwen3_next": "its layers are recurrent",
    "recurrent_gemma": "its layers are recurrent",
    "rwkv": "its layers are recurrent",
}
"""model_type -> why; what is not listed here is found out when it is loaded"""
LANGUAGE_PARTS: Mapping[str, str] = {"gemma3": "Gemma3ForCausalLM"}
"""model_type of models of several parts whose language model `import-model` takes out -> transformers' class of it"""
TIED_BY_DEFAULT = (
    "bloom", "cohere", "cohere2", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "granite_swa", "lfm2", "opt", "smollm3", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip
"""model_type of architectures whose head transformers ties where config.json does not say; loading knows the others"""


def ties_head(values: Mapping[str, Any]) -> bool:
    """Whether config.json says that the head is the embedding, by a word or by its silence."""
    return bool(values.get("tie_word_embeddings", values.get("model_type") in TIED_BY_DEFAULT))


def check_foreign(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for what cannot be trained. `where` names the file."""
    parts = [name for name in ("vision_config", "audio_config", "text_config") if isinstance(values.get(name), dict)]
    if parts:
        remedy = "choose a checkpoint of a language model"
        if values.get("model_type") in LANGUAGE_PARTS:
            remedy = f"`async-rl import-model {where.rpartition('/')[0]} DIR` takes its language model out"
        raise UserError(
            f"{where} describes a model of several parts ({', '.join(parts)}), and only a language model alone can be "
            f"trained; {remedy}"
        )
    if reason := REFUSED.get(str(values.get("model_type"))):
        raise UserError(
            f"{where}: models of type {values['model_type']!r} cannot be packed and decoded here: {reason}; choose a "
            "model of another architecture"
        )
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantised weights cannot be trained; use the unquantised checkpoint")
    if values.get("is_encoder_decoder"):
        raise UserError(f"{where}: encoder-decoder models are not supported; use a model with a decoder alone")
    if values.get("attention_chunk_size"):
        raise UserError(
            f"{where}: attention_chunk_size is not supported; use a model that attends to all before a token"
        )
    if values.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is set; only causal models generate, set it to false")


def foreign_context(values: Mapping[str, Any]) -> int:
    """Most tokens of a sequence; 0 where the file does not say."""
    most = values.get("max_position_embeddings") or values.get("n_positions") or 0
    return rope_context(values, most) if isinstance(most, int) and most else 0


def check_vllm(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise UserError where vLLM would compute another model than the trainer. `names`: of the stored weights."""
    remedy = "set generator.engine=embedded"
    for given in rope_settings(values):
        kind = given["rope_type"]
        # what vLLM reads and transformers does not, or the other way round
        told = [key for key in DIFFERENT.get(kind, ()) if given.get(key) is not None]
        if told:
            raise UserError(
                f"{where}: of rope type {kind!r} vLLM and transformers read {', '.join(told)} differently, so "
                f"generators would sample from another model than is trained; {remedy}, or take it out of the file"
            )
    if values.get("model_type") in ("qwen2", "qwen3") and len(set(windows_of(values, where))) > 1:
        raise UserError(
            f"{where}: vLLM has no sliding window in some layers only (max_window_layers) for this family; {remedy}"
        )
    if any(STACKED.search(name) for name in names):
        raise UserError(
            f"{where}: updated weights of a mixture of experts cannot be given to vLLM, which names them otherwise "
            f"than the trainer; {remedy}"
        )


DIFFERENT: Mapping[str, tuple[str, ...]] = {
    "longrope": ("attention_factor", "factor", "short_mscale", "long_mscale"),
    "dynamic": ("alpha", "max_trained_positions"),
}
"""rope type -> settings that vLLM 0.32 and transformers 5.19 do not both read"""


def check_expert_targets(targets: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError for a name in lora.targets that only experts have: they get no adapters. `shapes`: of the stored
    weights by name."""
    inside: set[str] = set()
    outside: set[str] = set()
    for name, shape in shapes.items():
        if len(shape) > 1:
            part = name.removesuffix(".weight").rpartition(".")[2]
            (inside if STACKED.search(name) else outside).add(part)
    for target in targets:
        if target in inside - outside:
            known = sorted(part for part in outside if part.endswith("proj"))
            raise UserError(
                f"lora.targets: {target!r} is in the experts alone, which transformers holds as stacked parameters, "
                f"and those get no adapter; name others ({', '.join(known)}), or train all weights with lora.rank=0"
            )


def frozen_experts(shapes: Mapping[str, Sequence[int]]) -> str:
    """What adapters leave out of a mixture of experts, for the user; empty for a model without experts. `shapes`: of
    the stored weights by name."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if STACKED.search(name))
    if not experts:
        return ""
    return (
        f"adapters leave out the experts, {experts:,} of {sum(sizes.values()):,} parameters "
        f"({experts / sum(sizes.values()):.0%}), which stay as they are; lora.rank=0 trains them too"
    )
