"""Adapters: what is trained, what it is merged to, what is saved, what the exact baseline sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support_models import llama_config, make_decoder, qwen2_config, qwen3_config
from support_run import quick_settings
from torch import Tensor

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.generator.pull import with_adapters
from async_rl.model.architecture import DecoderConfig
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, load_tensors
from async_rl.model.lora import A, Adapters, B, add_adapters, merged, read_adapters
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import load_checkpoint, save_checkpoint
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner
from async_rl.trainer.manifest import damage_of
from async_rl.trainer.packing import PackedBatch, pack_batch, pack_step
from async_rl.trainer.team import weights_hash
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.weights.shared_memory import WeightsError
from async_rl_kernels import reference

LORA = ("lora.rank=4", "lora.alpha=8", "optimizer.learning_rate=0.02")
CONFIGS = {
    "qwen3": qwen3_config(),
    "qwen2": qwen2_config(),
    "llama with every bias": llama_config(qkv_bias=True, output_bias=True, mlp_bias=True),
}


def model_with_adapters(config: DecoderConfig, targets: Sequence[str] = (), rank: int = 3) -> tuple[Decoder, Adapters]:
    """A model whose adapters do something: B is not zero."""
    model = make_decoder(config).to(torch.float64)
    torch.manual_seed(0)
    adapters = add_adapters(model, rank=rank, alpha=2.0 * rank, targets=targets)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return model.to(torch.float64), adapters


def episodes(step: int, groups: int = 2) -> list[Trajectory]:
    """Two-turn episodes in groups of four with made-up behaviour log-probs and unequal rewards."""
    drawn = np.random.default_rng(step)
    made = []
    for number in range(4 * groups):
        first, second = int(drawn.integers(1, 5)), int(drawn.integers(1, 4))
        length = 3 + first + 2 + second
        made.append(
            Trajectory(
                group=100 * step + number // 4,
                sample=number % 4,
                problem=0,
                split="train",
                seed=0,
                tokens=drawn.integers(0, 10, length).astype(np.int32),
                log_behaviour=drawn.uniform(-3.0, -1.0, length).astype(np.float32),
                turns=(Turn(start=3, length=first), Turn(start=5 + first, length=second)),
                versions=(VersionSpan(version=max(0, step - number % 2), start=3, end=length),),
                reward=float(number % 2),
                ended="finished",
            )
        )
    return made  # fmt: skip


def train(learner: Learner, settings: Settings, steps: Sequence[int]) -> list[object]:
    return [learner.step(pack_step(settings, episodes(step))).metrics for step in steps]


def forward(model: Decoder, tokens: Tensor) -> Tensor:
    return model(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)]))


def test_the_sum_is_weight_plus_scaled_product_to_the_last_bit_of_a_different_order_of_blocks() -> None:
    random = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=random) for shape in ((300, 700), (8, 700), (300, 8)))
    found = merged(weight, a, b, 0.25)
    exact = weight.double() + 0.25 * (b.double() @ a.double())
    assert torch.allclose(found.double(), exact, rtol=0, atol=2e-6)
    # a row alone, and a column alone: no element depends on how the tensor is cut
    assert torch.equal(found[17], merged(weight[17:18], a, b[17:18], 0.25)[0])
    assert torch.equal(found[:, 5], merged(weight[:, 5:6], a[:, 5:6], b, 0.25)[:, 0])
    assert torch.equal(merged(weight.bfloat16(), a, b, 0.25), merged(weight.bfloat16().float(), a, b, 0.25))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_adapters_computes_what_the_merged_model_computes(name: str) -> None:
    model, adapters = model_with_adapters(CONFIGS[name])
    tokens = torch.arange(20) % CONFIGS[name].vocabulary
    plain = Decoder(CONFIGS[name]).to(torch.float64)
    whole = dict(adapters.weights())
    assert whole.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(whole)
    with torch.no_grad():
        assert torch.allclose(forward(model, tokens), forward(plain, tokens), atol=1e-5)
        with adapters.off():
            before = forward(model, tokens)
        assert torch.equal(before, forward(make_decoder(CONFIGS[name]).to(torch.float64), tokens))
        assert not torch.allclose(before, forward(plain, tokens), atol=1e-2)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)


def test_fresh_adapters_change_no_bit_of_the_model(tiny_model: Path) -> None:
    learner = make_learner(quick_settings(tiny_model, *LORA))
    plain = make_learner(quick_settings(tiny_model))
    assert weights_hash(learner.weights()) == weights_hash(plain.weights())


def test_only_adapters_are_trained_and_have_optimizer_state(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, *LORA, "lora.targets=[q_proj,down_proj]", "recipe=grpo")
    learner = make_learner(settings)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    train(learner, settings, range(3))
    changed = {n for n, p in learner.model.named_parameters() if not torch.equal(before[n], p.detach())}
    expected = {n for n in before if ".lora_" in n}
    assert changed == expected == set(learner.trained())
    assert len(expected) == 2 * 2 * 2  # layers, targets, matrices
    assert {id(p) for p in learner.optimizer.state} == {id(p) for p in learner.trained().values()}
    base = load_tensors(tiny_model)
    differ = {name for name, tensor in learner.weights().items() if not torch.equal(tensor, base[name])}
    assert differ == {name for name in base if name.endswith(("q_proj.weight", "down_proj.weight"))}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 40])
@pytest.mark.parametrize("targets", [(), ("k_proj", "v_proj", "up_proj")], ids=str)
def test_exact_norms_of_adapters_equal_one_backward_per_trajectory(
    name: str, micro_batch_tokens: int, targets: tuple[str, ...]
) -> None:
    model, _ = model_with_adapters(CONFIGS[name], targets)
    batch = pack_batch(episodes(1), micro_batch_tokens=micro_batch_tokens)
    random = torch.Generator().manual_seed(7)
    weights = torch.randn(batch.num_policy_tokens, generator=random, dtype=torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    each = one_backward_each(model, trained, batch, weights)
    want_norms = torch.stack([torch.stack([g.square().sum() for g in part]).sum() for part in each])
    baseline = torch.tensor([0.3, 0.7], dtype=torch.float64)
    owner = batch.group_of_trajectory
    reward = batch.reward.double()
    multipliers = reward - baseline[owner]
    want = [sum(m * part[i] for m, part in zip(multipliers, each, strict=True)) for i in range(len(trained))]

    of_token = batch.trajectory_of_turn[batch.turn_of_token]
    gradient = TrajectoryGradient(model, ModelArithmetic(temperature=0.8))
    norms = gradient.add(batch, weights * reward[of_token], weights, lambda _norms: baseline)
    assert torch.allclose(norms, want_norms, rtol=1e-9, atol=1e-14)
    for parameter, expected in zip(trained, want, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def one_backward_each(
    model: Decoder, trained: Sequence[Tensor], batch: PackedBatch, weights: Tensor
) -> list[tuple[Tensor, ...]]:
    out = []
    for micro in batch.micro_batches:
        token = policy = 0
        for length, count in zip(micro.lengths, micro.policy_lengths, strict=True):
            rows, columns = slice(token, token + length), slice(policy, policy + count)
            hidden = model(micro.tokens[rows], micro.positions[rows], DocumentAttention([length]))
            hidden = hidden[micro.predictors[columns] - token]
            log_prob, _, _ = reference.linear_logprob(hidden, model.head, micro.targets[columns], temperature=0.8)
            loss = -(weights[micro.policy][columns] * log_prob).sum()
            out.append(torch.autograd.grad(loss, list(trained)))
            token, policy = token + length, policy + count
    return out


@pytest.mark.parametrize(
    "overrides",
    [
        ("recipe=vcpo",),
        ("recipe=ppo", "recipe.kl.coefficient=0.1", "updates.epochs=2"),
        ("recipe=turn_gae_ppo", "critic.kind=model", "critic.warmup_steps=1"),
    ],
    ids=" ".join,
)
def test_a_learner_of_adapters_saved_and_loaded_goes_on_bit_for_bit(
    overrides: tuple[str, ...], tmp_path: Path, tiny_model: Path
) -> None:
    settings = quick_settings(tiny_model, "trainer.steps=6", *LORA, *overrides)
    whole = make_learner(settings)
    train(whole, settings, range(3))
    path = save_checkpoint(tmp_path, whole, {}, source=tiny_model, keep=1)
    assert damage_of(path) is None
    there = train(whole, settings, range(3, 6))

    resumed = make_learner(settings)
    load_checkpoint(path, resumed)
    assert train(resumed, settings, range(3, 6)) == there
    assert weights_hash(resumed.weights()) == weights_hash(whole.weights())
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"?")
    assert "adapter/adapter_model.safetensors" in str(damage_of(path))


def test_the_reference_of_a_model_with_adapters_is_the_model_without_a_copy(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, *LORA, "recipe=ppo", "recipe.kl.coefficient=0.1")
    learner, copied = make_learner(settings), make_learner(replace(settings, lora=type(settings.lora)()))
    train(learner, settings, range(3))
    assert learner.reference is not None
    assert copied.reference is not None
    tokens = torch.arange(9) % 10
    found = learner.reference(tokens, torch.arange(9), DocumentAttention([9]))
    assert torch.equal(found, copied.reference(tokens, torch.arange(9), DocumentAttention([9])))
    assert not found.requires_grad
    assert learner.reference.head is learner.model.head


def test_a_critic_of_its_own_shares_the_frozen_weights_and_trains_adapters_of_its_own(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, *LORA, "recipe=turn_gae_ppo", "critic.kind=model", "critic.warmup_steps=1")
    learner = make_learner(settings)
    assert learner.critic is not None
    policy = {id(p): name for name, p in learner.model.named_parameters()}
    shared = {name for name, p in learner.critic.trunk.named_parameters() if id(p) in policy}
    assert shared == {name for name in policy.values() if ".lora_" not in name}
    before = {name: t.clone() for name, t in learner.critic.state_dict().items()}
    train(learner, settings, range(3))
    assert all(not torch.equal(before[name], tensor) for name, tensor in learner.critic.state_dict().items())


@pytest.mark.parametrize("foreign", [False, True], ids=["built-in", "through transformers"])
def test_plain_peft_and_plain_transformers_load_a_checkpoint(foreign: bool, tmp_path: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    source = tiny_model
    if foreign:
        source = tmp_path / "neox"
        torch.manual_seed(3)
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                max_position_embeddings=64,
            )
        ).save_pretrained(source)  # fmt: skip
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (source / file).write_bytes((tiny_model / file).read_bytes())
    settings = quick_settings(source, *LORA, "recipe=grpo", f"checkpoint.keep={1}")
    learner = make_learner(settings)
    train(learner, settings, range(2))
    path = save_checkpoint(tmp_path / "saved", learner, {}, source=source, keep=1)

    tokens = torch.arange(12) % 10
    with torch.no_grad():
        hidden = learner.model(tokens, torch.arange(12), DocumentAttention([12]))
        expected = hidden @ learner.model.head.T
        onto = AutoModelForCausalLM.from_pretrained(source)
        before = onto(input_ids=tokens[None]).logits[0]
        adapted = PeftModel.from_pretrained(onto, str(path / "adapter"))(input_ids=tokens[None]).logits[0]
        whole = AutoModelForCausalLM.from_pretrained(path)(input_ids=tokens[None]).logits[0]
    assert not torch.allclose(before, expected, atol=1e-3)
    assert torch.allclose(adapted, expected, atol=1e-5)
    assert torch.allclose(whole, expected, atol=1e-5)
    again = dict(load_model(path).named_parameters())  # as eval and a next run load it
    assert all(torch.equal(again[name], tensor) for name, tensor in learner.weights().items())


def test_adapters_alone_add_up_to_the_trainers_weights_bit_by_bit_and_are_fewer_bytes(tiny_model: Path) -> None:
    settings = quick_settings(tiny_model, *LORA, "lora.rank=2", "lora.send=adapter", "recipe=grpo")
    learner = make_learner(settings)
    train(learner, settings, range(2))
    sent = learner.sent()
    found = with_adapters(load_tensors(tiny_model), sent, 8 / 2)
    whole = learner.weights()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    layers = [name for name in whole if "proj" in name]
    assert sum(t.numel() for t in sent.values()) == sum(2 * sum(whole[name].shape) for name in layers)
    assert {n.removesuffix(A).removesuffix(B) for n in sent} == {n.removesuffix(".weight") for n in layers}


@pytest.mark.parametrize("wrong", ["half", "unknown", "misshapen"])
def test_adapters_that_do_not_fit_are_refused_by_name(wrong: str, tiny_model: Path) -> None:
    sent = make_learner(quick_settings(tiny_model, *LORA, "lora.send=adapter")).sent()
    layer = "model.layers.0.mlp.up_proj"
    match wrong:
        case "half":
            del sent[layer + B]
        case "unknown":
            layer = "model.layers.7.mlp.up_proj"
            sent |= {layer + A: torch.zeros(4, 32), layer + B: torch.zeros(64, 4)}
        case "misshapen":
            sent[layer + A] = torch.zeros(4, 33)
    with pytest.raises(WeightsError, match=f"the adapter of {layer} does not fit"):
        with_adapters(load_tensors(tiny_model), sent, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lora.alpha=3",), "lora.rank"),
        (("lora.send=adapter",), "lora.rank"),
        (("lora.rank=-1",), "at least 0"),
        (("lora.rank=4", "lora.alpha=0"), "above 0"),
        (("lora.rank=4", "lora.targets=[q_proj,q_proj]"), "twice"),
        (("lora.rank=4", "lora.dropout=0.1"), "dropout"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused(
    words: tuple[str, ...], message: str, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quick_settings(tiny_model, *words)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_prj"])
def test_a_target_that_is_no_projection_is_refused_with_the_nearest(target: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: .* is no linear layer"):
        make_learner(quick_settings(tiny_model, "lora.rank=4", f"lora.targets=[{target}]"))


def test_the_file_of_adapters_is_read_back_as_it_was(tmp_path: Path) -> None:
    _, adapters = model_with_adapters(qwen3_config())
    adapters.save(tmp_path / "adapter", base="somewhere")
    found = read_adapters(tmp_path / "adapter")
    assert all(torch.equal(found[name], tensor) for name, tensor in adapters.tensors().items())
