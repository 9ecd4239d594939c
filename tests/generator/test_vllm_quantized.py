"""What the canary sees of a quantized model in vLLM's workers. No machine of ours has the arithmetic: a stand-in keeps
what vLLM's worker has (its model, its reload) and quantizes as vLLM does, to float8 with a scale for each matrix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from async_rl.weights.blocks import join
from async_rl.weights.canary import Evidence, compare, fingerprint

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

SHAPES = {
    "model.embed_tokens.weight": (40, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16), "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24), "model.norm.weight": (16,),
}  # fmt: skip
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def weights(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in SHAPES.items()}


class Model(nn.Module):
    """Matrices as vLLM holds them behind its quantization: stacked, [in, out], float8 and a scale."""

    packed_modules_mapping = PACKED

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        yield from self.held.items()

    def quantize(self, given: dict[str, Tensor]) -> None:
        stack = torch.cat([given[f"model.layers.0.self_attn.{part}.weight"] for part in PACKED["qkv_proj"]])
        for name, matrix in (
            ("model.layers.0.self_attn.qkv_proj.weight", stack),
            ("model.layers.0.mlp.down_proj.weight", given["model.layers.0.mlp.down_proj.weight"]),
        ):
            scale = matrix.float().abs().max() / 448
            self.held[name] = (matrix.float() / scale).to(torch.float8_e4m3fn).T
            self.held[f"{name}_scale"] = scale
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            self.held[name] = given[name].clone()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("ASYNC_RL_VLLM_OWNER", raising=False)
    from async_rl.generator.vllm_worker import Weights

    class Worker(Weights):
        rank = 0
        model_config = SimpleNamespace(quantization="fp8")

        def __init__(self) -> None:
            self.model = Model()
            self.model.quantize(weights(0))

        def get_model(self) -> Any:  # type: ignore[override]
            return self.model

        def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:  # type: ignore[override]
            self.model.quantize(dict(weights_iterator))

    return Worker()


def differing(worker: Any, expected: dict[str, Tensor], version: int) -> tuple[set[str], set[str]]:
    """(tensors that the canary reports, those that it does not compare)."""
    shown = [worker.async_rl_show(version, [(name, list(shape)) for name, shape in SHAPES.items()], 1)]
    found = join(shown, SHAPES, version)
    split = {name for name, digest in found.items() if digest is None}
    digests = {name: digest for name, digest in found.items() if digest is not None}
    comparison = compare(
        Evidence(version=version, digests=fingerprint(expected, version), log_probs=()),
        Evidence(version=version, digests=digests, split=split, log_probs=()),
    )
    return set(comparison.tensors), split


def test_what_a_quantized_model_was_made_from_is_compared(worker: Any, tmp_path: Path) -> None:
    matrices = {name for name in SHAPES if "_proj" in name}
    assert differing(worker, weights(0), 0) == (set(), matrices), "from a folder: what is whole is compared"
    save_file(weights(1), tmp_path / "w")
    worker.async_rl_load(str(tmp_path / "w"), 1)
    assert differing(worker, weights(1), 1) == (set(), set())
    assert torch.equal(worker.model.held["model.norm.weight"], weights(1)["model.norm.weight"])
    assert differing(worker, weights(2), 1) == (set(SHAPES), set())


def test_an_old_or_partial_file_and_a_reload_that_did_nothing_are_seen(worker: Any, tmp_path: Path) -> None:
    mixed = {**weights(1), "model.layers.0.mlp.down_proj.weight": weights(0)["model.layers.0.mlp.down_proj.weight"]}
    save_file(mixed, tmp_path / "w")
    worker.async_rl_load(str(tmp_path / "w"), 1)
    assert differing(worker, weights(1), 1)[0] == {"model.layers.0.mlp.down_proj.weight"}
    worker.reload_weights = lambda **_: None
    save_file(weights(2), tmp_path / "w")
    worker.async_rl_load(str(tmp_path / "w"), 2)
    assert differing(worker, weights(2), 2)[0] == {"model.embed_tokens.weight", "model.norm.weight"}


def test_weights_that_came_over_a_link_are_compared_where_they_are_whole(worker: Any, tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "w")
    worker.async_rl_load(str(tmp_path / "w"), 1)
    worker.model.quantize(weights(2))  # vLLM's own engine
    wrong, split = differing(worker, weights(2), 2)
    assert not wrong
    assert split == {name for name in SHAPES if "_proj" in name}
