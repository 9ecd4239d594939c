"""Exact per-trajectory gradients against one autograd backward for each trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rl.batch import PackedBatch, pack_batch
from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.trainer.forward import Arithmetic
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl_kernels import head_gradient, reference

QWEN3 = DecoderConfig(
    family="qwen3", vocabulary=19, hidden=16, intermediate=24, layers=2, heads=4, kv_heads=2, head_dim=6,
    max_context=64, qk_norm=True, tied=True,
)  # fmt: skip
LLAMA = replace(QWEN3, family="llama", qk_norm=False, tied=False)
CONFIGS = {
    "qwen3 tied": QWEN3,
    "qwen3 untied": replace(QWEN3, tied=False),
    "qwen3 with attention bias": replace(QWEN3, qkv_bias=True, output_bias=True),
    "llama": LLAMA,
    "llama tied with every bias": replace(LLAMA, tied=True, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
}
TEMPERATURE = 0.8
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


def sample_model(config: DecoderConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(config)
    model.initialise(3, std=0.3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases away from their special values
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model.to(dtype)


def sample_weights(batch: PackedBatch, dtype: torch.dtype = torch.float64) -> Tensor:  # [policy tokens]
    return torch.randn(batch.num_policy_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


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
    return torch.stack([sum((g.double().square().sum() for g in each), torch.zeros(())) for each in gradients])


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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("micro_batch_tokens", [ONE_MICRO_BATCH, 60, 35, 1])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_norms_and_gradient_equal_one_backward_per_trajectory(name: str, micro_batch_tokens: int, scope: str) -> None:
    batch = sample_batch(micro_batch_tokens)
    model = sample_model(CONFIGS[name])
    weights = sample_weights(batch)
    owner = torch.repeat_interleave(
        torch.arange(batch.num_trajectories), torch.tensor([n for m in batch.micro_batches for n in m.policy_lengths])
    )
    each = trajectory_gradients(model, batch, weights)
    want_norms = norm_squares_of(each)
    baseline = optimal(batch, scope)(want_norms)[batch.group_of_trajectory]
    multipliers = batch.reward.double() - baseline
    want = [sum(m * g for m, g in zip(multipliers, parts, strict=True)) for parts in zip(*each, strict=True)]

    exact = TrajectoryGradient(model, Arithmetic(temperature=TEMPERATURE))
    norms = exact.add(
        batch, batch.reward.double()[owner] * weights, weights, optimal(batch, scope),
        scope="group" if scope == "group" else "batch",
    )  # fmt: skip

    assert torch.allclose(norms, want_norms, rtol=1e-9, atol=1e-14)
    assert relative_error(gradients_of(model), want) < 1e-9
