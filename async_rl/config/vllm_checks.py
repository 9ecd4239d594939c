"""What vLLM is asked for that it cannot do here, or that would bias what it samples. As in checks.py: a function a
relation."""

from __future__ import annotations

from async_rl.config.settings import Settings

INEXACT = ("synthetic",)
"""ways of verifying guessed tokens that keep some which are no samples of the model"""


def quantized_rollouts_need_vllm_on_a_gpu(s: Settings) -> str:
    chosen = s.generator
    if chosen.quantization == "none":
        return ""
    if chosen.engine != "vllm":
        return (
            f"generator.quantization={chosen.quantization} is done by vLLM, and generator.engine is {chosen.engine}, "
            "which computes in generator.dtype; set generator.engine=vllm, or leave it out"
        )
    if chosen.device == "cpu":
        return (
            f"generator.quantization={chosen.quantization} needs a GPU, and generator.device is cpu; set "
            "generator.device=cuda, or leave it out"
        )
    if chosen.dtype != "bfloat16":
        return (
            f"generator.quantization={chosen.quantization} multiplies with bfloat16, and generator.dtype is "
            f"{chosen.dtype}; set generator.dtype=bfloat16"
        )
    return ""


def guessed_tokens_are_samples(s: Settings) -> str:
    chosen = s.vllm.speculative
    if not chosen:
        return ""
    if chosen.get("rejection_sample_method") in INEXACT:
        return (
            f"vllm.speculative.rejection_sample_method={chosen['rejection_sample_method']} keeps tokens that are no "
            "samples of the model, so their log-probs would be wrong; leave it out"
        )
    if not chosen.get("method") and not chosen.get("model"):
        return (
            "vllm.speculative names neither a method nor a model that guesses; e.g. vllm.speculative="
            "'{method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}'"
        )
    return ""


def guesses_are_verified_on_a_gpu(s: Settings) -> str:
    if s.vllm.speculative and s.generator.device == "cpu":
        return (
            "vllm.speculative needs a GPU: on a CPU vLLM 0.32 verifies guessed tokens at a temperature out of memory "
            "that nobody wrote, and log-probs are wrong or no numbers; set generator.device=cuda, or leave it out"
        )
    return ""


def a_broadcast_is_loaded_as_it_comes(s: Settings) -> str:
    if not s.weights.broadcast:
        return ""
    if s.weights.transport not in ("auto", "nccl"):
        return (
            f"weights.broadcast is about weights over nccl, and weights.transport is {s.weights.transport}; leave one "
            "of them out"
        )
    if s.generator.engine != "vllm":
        return f"weights.broadcast is for vLLM, and generator.engine is {s.generator.engine}; leave it out"
    if s.generator.quantization != "none":
        return (
            f"weights.broadcast loads tensors as they come, and generator.quantization={s.generator.quantization} "
            "makes whole layers anew; leave weights.broadcast out"
        )
    return ""


VLLM_RELATIONS = (
    a_broadcast_is_loaded_as_it_comes,
    quantized_rollouts_need_vllm_on_a_gpu,
    guessed_tokens_are_samples,
    guesses_are_verified_on_a_gpu,
)
