"""Log-probs by the definition: every context of a trajectory alone through the model in float64, its logits divided by
the temperature of the turn. And small models in float64 for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from async_rl.config import OptimizerSettings
from async_rl.model.architecture import DecoderConfig
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.objective.library import load_recipe
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.packing import PackedBatch
from async_rl.trajectory import Trajectory

VOCABULARY = 19
QWEN3 = DecoderConfig(
    family="qwen3", vocabulary=VOCABULARY, hidden=16, intermediate=24, layers=2, heads=4, kv_heads=2, head_dim=6,
    max_context=64, qk_norm=True, tied=True,
)  # fmt: skip
LLAMA = replace(QWEN3, family="llama", qk_norm=False, qkv_bias=True, output_bias=True, mlp_bias=True)
CONFIGS = {"qwen3 tied": QWEN3, "qwen3 untied": replace(QWEN3, tied=False), "llama with every bias": LLAMA}
TEMPERATURE = 0.8
ARITHMETIC = ModelArithmetic(temperature=TEMPERATURE)


def alone(model: Decoder, trajectory: Trajectory) -> Tensor:  # [policy tokens]
    """Log-probs of the policy tokens by the definition, with a graph."""
    found = []
    bounds = [0, *trajectory.contexts, len(trajectory.tokens)]
    for begin, end in pairwise(bounds):
        tokens = torch.from_numpy(trajectory.tokens[begin:end].astype(np.int64))
        logits = model(tokens, torch.arange(end - begin), DocumentAttention([end - begin])) @ model.head.T
        if model.logit_cap:
            logits = model.logit_cap * torch.tanh(logits / model.logit_cap)
        for turn in trajectory.turns:
            if turn.length and begin <= turn.start < end:
                rows = logits[turn.start - begin - 1 : turn.start - begin - 1 + turn.length]
                sampled = tokens[turn.start - begin : turn.start - begin + turn.length]
                at = torch.log_softmax(rows / (turn.temperature or TEMPERATURE), -1)
                found.append(at.gather(1, sampled[:, None]).squeeze(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def sample_model(config: DecoderConfig = QWEN3, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(config)
    model.initialise(3, std=0.3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases away from their special values
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3)
    return model.to(dtype)


def make_learner(model: Decoder, recipe: str, critic: Critic | None = None) -> Learner:
    optimizer = OptimizerSettings(learning_rate=1e-3, warmup_steps=0, clip_norm=0.0)
    options = LearnerOptions(steps=10, optimizer=optimizer, arithmetic=ARITHMETIC)
    return Learner(model, load_recipe({"name": recipe}), options, critic=critic)


def each_gradient(model: Decoder, trajectories: Sequence[Trajectory], weights: Tensor) -> list[list[Tensor]]:
    """grad of -sum_t weights_t log pi_t of each trajectory alone. weights [policy tokens of all]."""
    parameters = list(model.parameters())
    parts = weights.split([t.num_policy_tokens for t in trajectories])
    out = []
    for trajectory, part in zip(trajectories, parts, strict=True):
        if not len(part):
            out.append([torch.zeros_like(p) for p in parameters])
            continue
        loss = -(part * alone(model, trajectory)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        out.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    return out


def some_weights(batch: PackedBatch) -> Tensor:  # [policy tokens]
    return torch.randn(batch.num_policy_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
