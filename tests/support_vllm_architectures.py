"""Architectures of the table in vLLM's CPU build, with the trainer's weights put into it.

As a program, `support_vllm_architectures.py NAME ...` tries rows by their names (all that are not refused without one),
one vLLM after the other in this process, and prints a line for each: NAME: largest difference of a log-prob from
transformers' (nats) before and after an update of the weights, number of tensors that the canary does not find.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support_architectures import ROWS, Architecture, documents, write_row
from torch import Tensor

from async_rl.generator.vllm_engine import VllmOptions, engine_arguments
from async_rl.model.folder import check_for_vllm, load_model, read_headers
from async_rl.weights.blocks import join
from async_rl.weights.canary import fingerprint

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    before: float
    """nats"""
    after: float
    """nats, with other weights loaded by their names in the trainer"""
    missing: list[str]
    """tensors of the trainer that the canary does not find in vLLM"""


def reference(folder: Path) -> Any:
    """Made before vLLM, whose back end for transformers' models changes their classes in this process."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def log_probs(model: Any, document: list[int]) -> Tensor:  # [tokens, vocabulary]
    logits = model(torch.tensor(document)[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.detach(), -1)


def difference(llm: Any, model: Any) -> float:
    """Over prompts, and over tokens that vLLM samples behind a prompt."""
    from vllm import SamplingParams

    worst = 0.0
    whole = [d.tolist() for d in documents()]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, logprobs=0, detokenize=False)
    answers = llm.generate([_prompt(t[:46]) for t in whole], params, use_tqdm=False)
    for tokens, answer in zip(whole, answers, strict=True):
        want = log_probs(model, tokens[:46])
        for at, entry in enumerate(answer.prompt_logprobs[1:]):
            worst = max(worst, abs(entry[tokens[at + 1]].logprob - float(want[at, tokens[at + 1]])))
    params = SamplingParams(max_tokens=20, logprobs=0, temperature=1.0, seed=1, ignore_eos=True, detokenize=False)
    answers = llm.generate([_prompt(t[:18]) for t in whole], params, use_tqdm=False)
    for tokens, answer in zip(whole, answers, strict=True):
        history, (made,) = tokens[:18], answer.outputs
        want = log_probs(model, [*history, *made.token_ids])[len(history) - 1 :]
        for at, (token, entry) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
            worst = max(worst, abs(entry[token].logprob - float(want[at, token])))
    return worst


def _prompt(tokens: list[int]) -> Any:
    from vllm.inputs import TokensPrompt

    return TokensPrompt(prompt_token_ids=tokens)


def attempt(row: Architecture, root: Path) -> Found:
    from vllm import LLM

    first, second = (write_row(root / str(seed), row, seed=seed, wide=True) for seed in (0, 1))
    check_for_vllm(first)
    options = VllmOptions(
        model=first, max_sequences=8, max_context=row.context, dtype="float32", device="cpu",
        kv_on_update="recompute", kv_cache_bytes=64 << 20, memory_share=0.5, tensor_parallel=1,
        layout=read_headers(first),
    )  # fmt: skip
    references = reference(first), reference(second)
    trained = {name: p.detach().contiguous() for name, p in load_model(second).named_parameters()}
    save_file(trained, root / "weights.safetensors")
    llm = LLM(**engine_arguments(options))
    before = difference(llm, references[0])
    llm.collective_rpc("async_rl_load", args=(str(root / "weights.safetensors"), 1))
    llm.reset_prefix_cache()
    after = difference(llm, references[1])
    layout = [(name, list(tensor.shape)) for name, tensor in trained.items()]
    shown = llm.collective_rpc("async_rl_show", args=(1, layout, 1))
    found = join(shown, {name: tensor.shape for name, tensor in trained.items()}, 1)
    right = fingerprint(trained, 1)
    return Found(before=before, after=after, missing=sorted(name for name in right if found.get(name) != right[name]))


def main(names: list[str]) -> None:
    for row in ROWS:
        if (names and row.name not in names) or row.vllm == "refused":
            continue
        with tempfile.TemporaryDirectory() as root:
            try:
                found = attempt(row, Path(root))
                said = f"{found.before:.1e} {found.after:.1e} {len(found.missing)} {' '.join(found.missing[:3])}"
            except Exception as error:
                said = f"failed: {type(error).__name__}: {str(error)[:300]}"
            print(f"{row.name}: {said}", flush=True)


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    main(sys.argv[1:])
