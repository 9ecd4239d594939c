"""The fused forward is the decoder's forward, on the decoder's own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support_models import llama_config, make_decoder, qwen2_config, qwen3_config, qwen3_folder

from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, save_folder
from async_rl.model.fused_decoder import FusedDecoder
from async_rl_kernels import product

CONFIGS = {
    "qwen3": qwen3_config(),
    "qwen2": qwen2_config(),
    "llama": llama_config(qkv_bias=True, output_bias=True, mlp_bias=True),
}


def hidden_of(model: Decoder | FusedDecoder) -> torch.Tensor:
    tokens = torch.arange(3, 43)
    positions = torch.cat([torch.arange(25), torch.arange(15)])
    with torch.no_grad():
        return model(tokens, positions, DocumentAttention([25, 15]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mkl", [True, False])
def test_both_forwards_agree_before_and_after_an_update_in_place(name, dtype, mkl, monkeypatch):
    monkeypatch.setattr(product, "PREFERS_MKL", mkl)
    plain, taken = make_decoder(CONFIGS[name]).to(dtype), make_decoder(CONFIGS[name]).to(dtype)
    fused = FusedDecoder(taken, 64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    assert torch.allclose(hidden_of(plain), hidden_of(fused), atol=tolerance)
    assert torch.equal(hidden_of(plain), hidden_of(taken))  # the decoder itself still works
    new = make_decoder(CONFIGS[name], seed=7).to(dtype)
    with torch.no_grad():
        for parameter, value in zip(taken.parameters(), new.parameters(), strict=True):
            parameter.copy_(value)
    assert torch.allclose(hidden_of(new), hidden_of(fused), atol=tolerance)
    assert not torch.allclose(hidden_of(plain), hidden_of(fused), atol=tolerance)


def test_a_fused_decoder_can_be_saved(tmp_path: Path):
    folder = qwen3_folder(tmp_path / "m")
    model = load_model(folder)
    FusedDecoder(model, 64)
    save_folder(tmp_path / "saved", model, source=folder)
    for a, b in zip(load_model(folder).parameters(), load_model(tmp_path / "saved").parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_of_the_file_stays_in_memory(tmp_path: Path):
    folder = qwen3_folder(tmp_path / "m")
    model = load_model(folder)
    FusedDecoder(model, 64)
    assert str(folder) not in Path("/proc/self/maps").read_text()
