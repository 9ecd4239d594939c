"""vLLM in bfloat16, as on GPUs: its logits in float32 are nearer to the trainer's. Both engines run on the CPU, one
after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support_models import llama_config, write_folder
from support_served import Served, ask, clean, prompt

from async_rl.model.folder import load_model

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.nightly]


CONFIG = llama_config(hidden=64, head_dim=32)
OFFSET = 20.0
"""what all logits of a token have in common, as those of trained models do: softmax ignores it, rounding does not"""


def folder_with_offset(path: Path) -> Path:
    """A model whose first channel is a constant that the head turns into `OFFSET`."""
    folder = write_folder(path, CONFIG)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0
    tensors["model.embed_tokens.weight"][:, 0] = 16.0
    tensors["model.norm.weight"][0] = 1.0
    tensors["lm_head.weight"][:, 0] = OFFSET / 64**0.5  # root of the mean square is 16 / 8, nearly
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def mismatch(folder: Path, head_dtype: str) -> tuple[float, float]:
    """Mean |difference| of a log-prob, and the spread of a sequence's log-ratio, at lag 0; nats."""
    model = load_model(folder)
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    served = Served(folder, dtype="bfloat16", head_dtype=head_dtype, layout=layout)
    try:
        requests = [ask(i, prompt(i, 8), 100) for i in range(48)]
        done = served.ask(requests)
    finally:
        served.run(served.engine.close())
        served.loop.call_soon_threadsafe(served.loop.stop)
    found = []
    for request, completion in zip(requests, done, strict=True):
        expected = clean(model, [*request.tokens, *completion.tokens])[len(request.tokens) - 1 :]
        found.append(np.asarray(completion.log_probs) - expected)
    return float(np.abs(found).mean()), float(np.std([one.sum() for one in found]))


def test_logits_in_float32_are_nearer_to_the_trainers(tmp_path: Path) -> None:
    folder = folder_with_offset(tmp_path / "m")
    rounded, head = (mismatch(folder, kind) for kind in ("model", "float32"))
    print(f"mean {rounded[0]:.4f} -> {head[0]:.4f}, sequence log-ratio {rounded[1]:.3f} -> {head[1]:.3f}")
    assert head[0] < 0.9 * rounded[0]
    assert head[1] < rounded[1]
