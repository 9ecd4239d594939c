"""Layers computed again in the backward pass, compiled, or in bfloat16: the same gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import llama_config, make_decoder, qwen2_config, qwen3_config
from support_run import quick_settings
from torch import Tensor

from async_rl.errors import UserError
from async_rl.model.decoder import Decoder, LayerExecution
from async_rl.model.folder import load_model
from async_rl.model.lora import add_adapters
from async_rl.run.preflight import preflight
from async_rl.trainer.build import make_learner
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan

CONFIGS = {"qwen3": qwen3_config(), "qwen2": qwen2_config(), "llama": llama_config()}
PLAIN = ModelArithmetic(temperature=0.8)


def packed(num: int = 6, seed: int = 0, tokens: int = 10_000) -> PackedBatch:
    drawn = np.random.default_rng(seed)
    made = []
    for number in range(num):
        length = int(drawn.integers(4, 20))
        made.append(
            Trajectory(
                group=number // 3,
                sample=number % 3,
                problem=0,
                split="train",
                seed=0,
                tokens=drawn.integers(0, 10, length).astype(np.int32),
                log_behaviour=np.zeros(length, np.float32),
                turns=(Turn(start=2, length=length - 2),),
                versions=(VersionSpan(version=0, start=2, end=length),),
                reward=float(number % 2),
                ended="finished",
            )
        )
    return pack_batch(made, micro_batch_tokens=tokens)  # fmt: skip


def gradient(model: Any, batch: PackedBatch, arithmetic: ModelArithmetic = PLAIN) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and the gradient of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    found = log_probs(model, batch.micro_batches[0], arithmetic)
    weight = torch.randn(len(found.log_prob), generator=torch.Generator().manual_seed(4))
    (found.log_prob * weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found.log_prob.detach(), {name: g.clone() for name, g in gradients.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_computed_again_give_the_same_gradient_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, batch = make_decoder(CONFIGS[name]), packed()
    arithmetic = replace(PLAIN, dtype=dtype)
    expected = gradient(model, batch, arithmetic)
    model.set_execution(LayerExecution(checkpointed=True))
    found = gradient(model, batch, arithmetic)
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])


def test_adapters_in_layers_computed_again_get_the_same_gradient() -> None:
    model, batch = make_decoder(qwen3_config()), packed()
    add_adapters(model, rank=2, alpha=4.0)
    expected = gradient(model, batch)
    model.set_execution(LayerExecution(checkpointed=True))
    found = gradient(model, batch)
    assert len(found[1]) == 2 * 2 * 7
    assert same(found[1], expected[1])


def test_a_model_of_transformers_with_dropout_and_layers_computed_again_gives_the_same_gradient(
    tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=3, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5)
    ).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_model / file).read_bytes())
    batch = packed()
    expected = gradient(load_model(tmp_path), batch)
    learner = make_learner(quick_settings(tmp_path, "recipe=grpo", "trainer.checkpoint_activations=layer"))
    found = gradient(learner.model, batch)
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])
    assert peak_bytes(learner.model, batch) < 0.8 * peak_bytes(load_model(tmp_path), batch)
    with pytest.raises(UserError, match=r"trainer\.compile is for the built-in decoder"):
        make_learner(quick_settings(tmp_path, "recipe=grpo", "trainer.compile=true"))


def peak_bytes(model: Any, batch: PackedBatch) -> int:
    """The most that torch held during forward and backward above what was there before, by its allocation events."""
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradient(model, batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_layers_computed_again_hold_a_fraction_of_the_memory() -> None:
    model, batch = make_decoder(qwen3_config(layers=8)), packed(40)
    kept = peak_bytes(model, batch)
    model.set_execution(LayerExecution(checkpointed=True))
    assert peak_bytes(model, batch) < 0.4 * kept


def test_exact_norms_see_every_layer_once_whatever_the_layers_are_told() -> None:
    batch = packed()
    weights = torch.randn(batch.num_policy_tokens, generator=torch.Generator().manual_seed(1))
    reward = batch.reward[batch.trajectory_of_turn[batch.turn_of_token]]
    results = []
    for how in (LayerExecution(), LayerExecution(checkpointed=True, compiled=True)):
        model = make_decoder(qwen3_config())
        model.set_execution(how)
        exact = TrajectoryGradient(model, PLAIN)
        norms = exact.add(batch, weights * reward, weights, lambda _norms: torch.zeros(2, dtype=torch.float64))
        assert all(layer.execution == how for layer in model.model.layers)
        results.append((norms, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_compiled_layers_compute_the_same_for_any_number_of_tokens_with_two_graphs_a_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tolerance 2e-5 of the largest element: the compiler fuses and so rounds otherwise."""
    # a vLLM of another test in this process has turned the compiler off for its own
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # large enough for the faster products of model/matmul.py, which compiled code leaves out
    model = make_decoder(qwen3_config(layers=3, hidden=128, intermediate=256), std=0.05)
    for seed, num in ((0, 8), (1, 14), (2, 10)):
        batch = packed(num, seed)
        model.set_execution(LayerExecution())
        expected = gradient(model, batch)
        model.set_execution(LayerExecution(compiled=True))
        found = gradient(model, batch)
        assert torch.allclose(found[0], expected[0], atol=2e-5)
        for name, want in expected[1].items():
            assert float((found[1][name] - want).abs().max()) <= 2e-5 * max(1.0, float(want.abs().max())), name
    # not one for each layer or each number of tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_copy_of_a_model_is_carried_out_by_its_own_weights() -> None:
    from copy import deepcopy

    model = make_decoder(qwen3_config())
    model.set_execution(LayerExecution(checkpointed=True))
    other = deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(gradient(model, packed())[0], gradient(other, packed())[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_keeps_weights_gradients_and_log_probs_in_float32_and_is_near(name: str) -> None:
    """Stated bound: log-probs within 0.06 nats in the mean and the gradient's cosine to float32's above 0.99, for
    sharp random models of two layers (bfloat16 has eight bits; the error grows with depth)."""
    model, batch = make_decoder(CONFIGS[name]), packed(30)
    plain, wanted = gradient(model, batch)
    half, found = gradient(model, batch, replace(PLAIN, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(g.dtype == torch.float32 for g in found.values())
    difference = (half - plain).abs()
    assert 0 < float(difference.mean()) < 0.06
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (wanted, found)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.99


@pytest.mark.parametrize("words", [("trainer.checkpoint_activations=layer",), ("trainer.compile=true",)], ids=str)
def test_what_exact_norms_leave_no_room_for_is_refused_with_the_setting_to_change(
    words: tuple[str, ...], tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"recipe\.opob\.norm=exact"):
        preflight(quick_settings(tiny_model, "recipe=vcpo", *words))
    preflight(quick_settings(tiny_model, "recipe=vcpo", "recipe.opob.norm=logit", *words))


def test_the_settings_reach_every_layer(tiny_model: Path) -> None:
    words = ("recipe=grpo", "trainer.checkpoint_activations=layer", "trainer.compile=true")
    model = make_learner(quick_settings(tiny_model, *words)).model
    assert isinstance(model, Decoder)
    assert all(layer.execution == LayerExecution(checkpointed=True, compiled=True) for layer in model.model.layers)
