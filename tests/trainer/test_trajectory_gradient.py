"""Exact per-trajectory gradients against one autograd backward for each trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support_definition import QWEN3, TEMPERATURE, sample_model
from torch import Tensor

from async_rl.errors import UserError
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl_kernels import reference

LLAMA = replace(QWEN3, family="llama", qk_norm=False, tied=False)
CONFIGS = {
    "qwen3 tied": QWEN3,
    "qwen3 untied": replace(QWEN3, tied=False),
    "qwen3 with attention bias": replace(QWEN3, qkv_bias=True, output_bias=True),
    "llama": LLAMA,
    "llama tied with every bias": replace(LLAMA, tied=True, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
}
ONE_MICRO_BATCH = 10_000
# (prompt, turns of (policy tokens, environment tokens)); groups of three
SHAPES: list[tuple[int, list[tuple[int, int]]]] = [
    (4, [(5, 0)]), (1, [(1, 0)]), (6, [(3, 2), (4, 1), (1, 0)]),
    (3, [(0, 0)]), (9, []), (2, [(12, 3), (2, 0)]),
    (5, [(1, 4)]), (7, [(20, 0)]), (1, [(2, 1), (2, 1)]),
]  # fmt: skip


def trajectory(number: int, prompt: int, turns: list[tuple[int, int]], random: np.random.Generator) -> Trajectory:
    start, made = prompt, []
    for length, environment in turns:
        made.append(Turn(start=start, length=length))
        start += length + environment
    return Trajectory(
        group=number // 3, sample=number % 3, problem=0, split="train", seed=0,
        tokens=random.integers(0, QWEN3.vocabulary, start).astype(np.int32),
        log_behaviour=np.zeros(start, np.float32), turns=tuple(made),
        versions=(VersionSpan(version=0, start=0, end=start),), reward=float(random.integers(0, 3)), ended="finished",
    )  # fmt: skip


def sample_batch(micro_batch_tokens: int) -> PackedBatch:
    random = np.random.default_rng(1)
    all_of_them = [trajectory(i, *shape, random) for i, shape in enumerate(SHAPES)]
    return pack_batch(all_of_them, micro_batch_tokens=micro_batch_tokens)


def sample_weights(batch: PackedBatch, dtype: torch.dtype = torch.float64) -> Tensor:  # [policy tokens]
    random = torch.Generator().manual_seed(7)
    return torch.randn(batch.num_policy_tokens, generator=random, dtype=torch.float64).to(dtype)


def trajectory_gradients(model: Decoder, batch: PackedBatch, weights: Tensor) -> list[list[Tensor]]:
    """grad of -sum_t weights_t log pi_t for each trajectory alone: one backward each."""
    out = []
    for micro in batch.micro_batches:
        token = policy = 0
        for length, count in zip(micro.lengths, micro.policy_lengths, strict=True):
            rows, columns = slice(token, token + length), slice(policy, policy + count)
            hidden = model(micro.tokens[rows], micro.positions[rows], DocumentAttention([length]))
            hidden = hidden[micro.predictors[columns] - token]
            log_prob, _, _ = reference.linear_logprob(
                hidden, model.head, micro.targets[columns], temperature=TEMPERATURE
            )
            loss = -(weights[micro.policy][columns] * log_prob).sum()
            out.append(list(torch.autograd.grad(loss, list(model.parameters()))))
            token, policy = token + length, policy + count
    return out


def norm_squares_of(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([g.double().square().sum() for g in each]).sum() for each in gradients])


def optimal(batch: PackedBatch, scope: str) -> Callable[[Tensor], Tensor]:
    """sum n R / sum n, per group or over the batch."""
    group = batch.group_of_trajectory

    def baselines(norm_squares: Tensor) -> Tensor:
        key = group if scope == "group" else torch.zeros_like(group)
        top = torch.zeros(3, dtype=torch.float64).index_add(0, key, norm_squares * batch.reward)
        bottom = torch.zeros(3, dtype=torch.float64).index_add(0, key, norm_squares)
        found = top / bottom.clamp(min=1e-300)
        return found if scope == "group" else found[:1].expand(3)

    return baselines


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest over parameters of |got - want| / |want|."""
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, want, strict=True))


def gradients_of(model: Decoder) -> list[Tensor]:
    out = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        out.append(parameter.grad)
    return out


def owner_of(batch: PackedBatch) -> Tensor:  # [policy tokens]
    return batch.trajectory_of_turn[batch.turn_of_token]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("micro_batch_tokens", [ONE_MICRO_BATCH, 60, 35, 1])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_norms_and_gradient_equal_one_backward_per_trajectory(name: str, micro_batch_tokens: int, scope: str) -> None:
    batch = sample_batch(micro_batch_tokens)
    model = sample_model(CONFIGS[name])
    weights = sample_weights(batch)
    want_norms, want = brute_force(model, batch, weights, scope)
    norms = add(model, batch, weights, scope)
    assert torch.allclose(norms, want_norms, rtol=1e-9, atol=1e-14)
    assert relative_error(gradients_of(model), want) < 1e-9


def brute_force(model: Decoder, batch: PackedBatch, weights: Tensor, scope: str) -> tuple[Tensor, list[Tensor]]:
    each = trajectory_gradients(model, batch, weights)
    norms = norm_squares_of(each)
    multipliers = batch.reward.double() - optimal(batch, scope)(norms)[batch.group_of_trajectory]
    total = [torch.zeros_like(p) for p in each[0]]
    for m, parts in zip(multipliers, each, strict=True):
        for t, g in zip(total, parts, strict=True):
            t += m * g
    return norms, total


def add(model: Decoder, batch: PackedBatch, weights: Tensor, scope: str, *, dtype: torch.dtype | None = None) -> Tensor:
    exact = TrajectoryGradient(model, ModelArithmetic(temperature=TEMPERATURE, dtype=dtype or torch.float32))
    policy = batch.reward[owner_of(batch)].to(weights.dtype) * weights
    return exact.add(batch, policy, weights, optimal(batch, scope), scope="group" if scope == "group" else "batch")


@pytest.mark.parametrize("micro_batch_tokens", [ONE_MICRO_BATCH, 35])
@pytest.mark.parametrize("name", ["qwen3 tied", "llama"])
def test_float32_is_right_to_rounding(name: str, micro_batch_tokens: int) -> None:
    batch = sample_batch(micro_batch_tokens)
    weights = sample_weights(batch)
    want_norms, want = brute_force(sample_model(CONFIGS[name]), batch, weights, "group")
    model = sample_model(CONFIGS[name], torch.float32)
    norms = add(model, batch, weights.float(), "group")
    assert ((norms - want_norms).abs() <= 3e-5 * want_norms).all()
    assert relative_error(gradients_of(model), want) < 3e-5


def test_bfloat16_is_as_near_as_an_ordinary_backward_in_bfloat16() -> None:
    batch = sample_batch(ONE_MICRO_BATCH)
    weights = sample_weights(batch)
    want_norms, _ = brute_force(sample_model(QWEN3), batch, weights, "group")
    model = sample_model(QWEN3, torch.float32)
    norms = add(model, batch, weights.float(), "group", dtype=torch.bfloat16)
    assert ((norms - want_norms).abs() <= 0.05 * want_norms).all()
    multipliers = (batch.reward - optimal(batch, "group")(norms)[batch.group_of_trajectory]).float()
    ordinary = sample_model(QWEN3, torch.float32)
    graph = log_probs(ordinary, batch.micro_batches[0], ModelArithmetic(temperature=TEMPERATURE, dtype=torch.bfloat16))
    (-(multipliers[owner_of(batch)] * weights.float() * graph.log_prob).sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert relative_error(gradients_of(model), [g.double() for g in gradients_of(ordinary)]) < 0.05


def test_forward_gives_log_probs_before_the_coefficients_are_known() -> None:
    batch = sample_batch(ONE_MICRO_BATCH)
    model = sample_model(QWEN3)
    exact = TrajectoryGradient(model, ModelArithmetic(temperature=TEMPERATURE))
    found = exact.forward(batch.micro_batches[0])
    want = log_probs(model, batch.micro_batches[0], ModelArithmetic(temperature=TEMPERATURE))
    for name in ("log_prob", "entropy", "prob_square_sum"):
        assert not getattr(found, name).requires_grad
        assert torch.allclose(getattr(found, name), getattr(want, name), rtol=1e-12)
    weights = found.log_prob.exp()
    policy = batch.reward[owner_of(batch)] * weights
    norms = exact.add(batch, policy, weights, optimal(batch, "group"))
    assert torch.allclose(norms, norm_squares_of(trajectory_gradients(model, batch, weights)), rtol=1e-9, atol=1e-14)


def test_gradients_add_up_over_calls() -> None:
    batch = sample_batch(35)
    model = sample_model(LLAMA)
    weights = sample_weights(batch)
    add(model, batch, weights, "group")
    once = [g.clone() for g in gradients_of(model)]
    add(model, batch, weights, "group")
    assert relative_error(gradients_of(model), [2 * g for g in once]) < 1e-12


def test_importance_weights_of_any_size_keep_their_norms_in_float32() -> None:
    batch = sample_batch(ONE_MICRO_BATCH)
    model = sample_model(QWEN3, torch.float32)
    weights = sample_weights(batch, torch.float32)
    factor = torch.logspace(-30, 30, batch.num_trajectories, dtype=torch.float64)
    plain = add(model, batch, weights, "group")
    scaled = add(model, batch, (weights * factor[owner_of(batch)]).float(), "group")
    alive = plain > 0
    assert ((scaled / (plain * factor.square()))[alive] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("micro_batch_tokens", [ONE_MICRO_BATCH, 20])
def test_a_group_of_equal_rewards_leaves_exactly_nothing(micro_batch_tokens: int) -> None:
    batch = replace(sample_batch(micro_batch_tokens), reward=torch.full((9,), 0.7))
    model = sample_model(QWEN3, torch.float32)
    exact = TrajectoryGradient(model, ModelArithmetic(temperature=TEMPERATURE))
    weights = torch.full((batch.num_policy_tokens,), 0.25)  # a power of two: R c / c is R again
    exact.add(batch, batch.reward[owner_of(batch)] * weights, weights, lambda _: batch.reward[:3].double())
    assert all(not g.any() for g in gradients_of(model))


def test_parameters_that_are_not_trained_neither_count_nor_move() -> None:
    batch = sample_batch(35)
    model = sample_model(CONFIGS["llama tied with every bias"])
    weights = sample_weights(batch)
    each = trajectory_gradients(model, batch, weights)
    trained = [".q_proj." in name or "layernorm" in name for name, _ in model.named_parameters()]
    for parameter, train in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(train)
    norms = add(model, batch, weights, "group")
    some = [[g for g, train in zip(parts, trained, strict=True) if train] for parts in each]
    assert torch.allclose(norms, norm_squares_of(some), rtol=1e-9, atol=1e-14)
    assert [p.grad is not None for p in model.parameters()] == trained


def test_a_batch_without_policy_tokens_has_no_gradient() -> None:
    random = np.random.default_rng(0)
    batch = pack_batch([trajectory(i, 4, [], random) for i in range(3)], micro_batch_tokens=ONE_MICRO_BATCH)
    model = sample_model(QWEN3)
    norms = add(model, batch, torch.zeros(0, dtype=torch.float64), "group")
    assert norms.tolist() == [0.0, 0.0, 0.0]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    batch = sample_batch(ONE_MICRO_BATCH)
    model = sample_model(QWEN3)
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    exact = TrajectoryGradient(model, ModelArithmetic(temperature=TEMPERATURE))
    broken = replace(batch.micro_batches[0], documents=(3, 4))
    with pytest.raises(ValueError, match="tokens for documents"):
        exact.forward(broken)
    exact.forward(batch.micro_batches[0])
    assert all(not module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        identity, trained, value = before[name]
        assert id(parameter) == identity
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, value)


def test_another_architecture_is_refused_with_the_options_that_work() -> None:
    with pytest.raises(UserError, match=r"recipe\.opob\.norm to logit or length"):
        TrajectoryGradient(torch.nn.Linear(2, 2), ModelArithmetic(temperature=1.0))  # type: ignore[arg-type]
