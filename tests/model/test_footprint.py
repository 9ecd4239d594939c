"""Formulas of memory against what torch really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support_models import llama_config, qwen2_config, qwen3_config

from async_rl.model.architecture import (
    DecoderConfig,
    activation_bytes,
    kept_bytes,
    layer_parameters,
    log_prob_bytes,
    lora_parameters,
    micro_batch_that_fits,
    parameters,
)
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl_kernels import native

SHAPES = {"qwen3": qwen3_config, "qwen2": qwen2_config, "llama": llama_config}
WIDE = {"hidden": 64, "intermediate": 176, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 16, "max_context": 512}


def saved_bytes(config: DecoderConfig, lengths: list[int], *, bfloat16: bool) -> int:
    """Storages that a forward keeps for its backward, parameters aside."""
    model = Decoder(config)
    model.initialise(0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copy_of_a_norm = tensor.dtype == torch.bfloat16 and tensor.dim() == 1  # a few bytes
        if storage.data_ptr() not in own and not copy_of_a_norm:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # no other tensor may take its place while we count
        return tensor

    tokens = torch.randint(0, config.vocabulary, (sum(lengths),))
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):  # noqa: SIM117
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            hidden = model(tokens, positions, DocumentAttention(lengths))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate counts what torch's own operations keep; compiled functions, where there are some, keep less."""
    monkeypatch.setattr(native, "usable", lambda *_: False)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_one_document_keeps_is_counted_to_the_byte(shape: str, bfloat16: bool) -> None:
    config = SHAPES[shape](**WIDE)
    counted = activation_bytes(config, 500, bfloat16=bfloat16, packed=False)
    assert saved_bytes(config, [500], bfloat16=bfloat16) == counted


@pytest.mark.parametrize("bfloat16", [False, True])
def test_packed_documents_keep_what_is_said_and_the_padding(bfloat16: bool) -> None:
    config = qwen3_config(**WIDE)
    said = activation_bytes(config, 500, bfloat16=bfloat16)
    assert saved_bytes(config, [250, 250], bfloat16=bfloat16) == pytest.approx(said, rel=0.002)
    assert said < saved_bytes(config, [100, 200, 150, 50], bfloat16=bfloat16) < 1.08 * said


def test_parameters_are_the_models() -> None:
    for make in SHAPES.values():
        config = make(**WIDE)
        model = Decoder(config)
        assert parameters(config) == sum(p.numel() for p in model.parameters())
        assert layer_parameters(config) == sum(p.numel() for p in model.model.layers[1].parameters())


def test_checkpointing_keeps_each_layers_input_and_one_layer() -> None:
    config = qwen2_config(**WIDE)
    kept = kept_bytes(config, bfloat16=False, packed=True)
    whole = activation_bytes(config, 1000, bfloat16=False)
    part = activation_bytes(config, 1000, bfloat16=False, checkpointing=True)
    assert whole - part == 1000 * (config.layers * (kept.layer - kept.boundary) - kept.layer)
    one_layer = replace(config, layers=1)
    assert activation_bytes(one_layer, 1000, bfloat16=False, checkpointing=True) >= activation_bytes(
        one_layer, 1000, bfloat16=False
    )


def test_adapters_are_counted_by_layer() -> None:
    config = qwen3_config(**WIDE)
    query, kv = 6 * 16, 2 * 16
    assert lora_parameters(config, 8, ("q_proj",)) == 3 * 8 * (64 + query)
    assert lora_parameters(config, 1) == 3 * (2 * (64 + query) + 2 * (64 + kv) + 3 * (64 + 176))


def test_the_micro_batch_that_fits_is_the_largest() -> None:
    config = qwen3_config(**WIDE)

    def needed(tokens: int) -> int:
        return activation_bytes(config, tokens, bfloat16=True) + log_prob_bytes(config, tokens)

    room = 100 << 20
    tokens = micro_batch_that_fits(config, room, bfloat16=True, checkpointing=False)
    assert needed(tokens) <= room < needed(tokens + 256)
    assert micro_batch_that_fits(config, 1000, bfloat16=True, checkpointing=False) == 0
    assert micro_batch_that_fits(config, room, bfloat16=True, checkpointing=True) > tokens
