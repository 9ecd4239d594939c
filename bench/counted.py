"""A gradient on a real model against what its matrix products alone take, in one process.

    python bench/counted.py MODEL [--groups 8] [--samples 4] [--prompt 45] [--answer 15] [--repeats 3] [--threads 1]

Products: those of the model's linear layers and its head, forward and both backward ones, at the shapes of this batch,
with beginnings of a group counted once and the last layer's rows that predict nothing left out, each timed by itself
with torch's own product. For `exact` they are more: the gradient of a row's input is each trajectory's own, also in a
beginning that several share, and norms take products of a trajectory's tokens among each other.

The gradient is timed beside them, in turns, forward, backward and AdamW: `plain` (no baseline by norms) and `exact`
(OPOB with exact norms). Times are the processor's, ratios medians of those within a round. Memory is the most that
torch held during a step, against 16 bytes a parameter (weights, gradient, two moments) plus the counted activations
(`model.architecture.activation_bytes`).

Targets: plain <= 1.25 and exact <= 1.5 times their products, memory <= 1.3.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peak import peak_bytes

from async_rl.config import OptimizerSettings
from async_rl.model.architecture import activation_bytes, log_prob_bytes
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model
from async_rl.trainer.arithmetic import ModelArithmetic
from async_rl.trainer.forward import log_probs
from async_rl.trainer.learner import make_optimizer
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan

ARITHMETIC = ModelArithmetic(temperature=1.0)


def made(model: Decoder, groups: int, samples: int, prompt: int, answer: int) -> list[Trajectory]:
    """Groups of samples behind one prompt each, of random tokens."""
    draw, found = np.random.default_rng(0), []
    for group in range(groups):
        before = draw.integers(0, model.config.vocabulary, prompt)
        for sample in range(samples):
            tokens = np.concatenate((before, draw.integers(0, model.config.vocabulary, answer))).astype(np.int32)
            found.append(
                Trajectory(
                    group=group,
                    sample=sample,
                    problem=group,
                    split="train",
                    seed=group * samples + sample,
                    tokens=tokens,
                    log_behaviour=np.zeros(len(tokens), np.float32),
                    turns=(Turn(start=prompt, length=answer),),
                    versions=(VersionSpan(version=0, start=0, end=len(tokens)),),
                    reward=float(draw.integers(0, 2)),
                    ended="finished",
                )
            )
    return found


Shape = tuple[int, int, int, int]
"""rows of the forward and of the weight's gradient, rows of the gradient of the input, in, out"""


def shapes_of(model: Decoder, batch: PackedBatch, *, apart: bool) -> list[Shape]:
    """Of every linear layer and the head. `apart`: where each trajectory has a gradient of its own."""
    found = []
    for micro in batch.micro_batches:
        rows, predicting, every = len(micro.tokens), len(micro.predicting), sum(micro.lengths)
        policy = len(micro.targets)
        for number, layer in enumerate(model.model.layers):
            last = number == model.config.layers - 1
            at, mlp = layer.self_attn, layer.mlp
            for linear in (at.q_proj, at.k_proj, at.v_proj):
                found.append((rows, every if apart else rows, linear.in_features, linear.out_features))
            for linear in (at.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                forward = (policy if apart else predicting) if last else rows
                back = forward if last or not apart else every
                found.append((forward, back, linear.in_features, linear.out_features))
        found.append((policy, policy, model.config.hidden, model.config.vocabulary))
    return found


def products(shapes: list[Shape], trajectories: int = 0) -> tuple[float, float]:
    """(processor seconds, operations) of the products, forward and backward, with `trajectories` also those of norms.
    Equal ones are timed three times and counted as often as they occur."""
    seconds = operations = 0.0
    for shape in sorted(set(shapes)):
        rows, back, width, out = shape
        x, weight, pull, more = (torch.randn(*s) for s in ((rows, width), (out, width), (rows, out), (back, out)))
        length = back // trajectories if trajectories else 0
        left, right = torch.randn(trajectories, length, width), torch.randn(trajectories, length, out)
        each = []
        for _ in range(3):
            began = time.process_time()
            torch.nn.functional.linear(x, weight)
            more @ weight
            pull.t() @ x
            if trajectories:
                left @ left.mT
                right @ right.mT
            each.append(time.process_time() - began)
        seconds += shapes.count(shape) * statistics.median(each)
        norms = 2.0 * trajectories * length * length * (width + out)
        operations += shapes.count(shape) * (4.0 * rows * width * out + 2.0 * back * width * out + norms)
    return seconds, operations


def plain(model: Decoder, batch: PackedBatch, weights: torch.Tensor) -> None:
    for micro in batch.micro_batches:
        (-(weights[micro.policy] * log_probs(model, micro, ARITHMETIC).log_prob).sum()).backward()


def exact(model: Decoder, batch: PackedBatch, weights: torch.Tensor) -> None:
    group = batch.group_of_trajectory
    owner = batch.trajectory_of_turn[batch.turn_of_token]

    def baselines(squares: torch.Tensor) -> torch.Tensor:
        zero = squares.new_zeros(batch.num_groups)
        return zero.index_add(0, group, squares * batch.reward) / zero.index_add(0, group, squares).clamp(min=1e-300)

    TrajectoryGradient(model, ARITHMETIC).add(batch, batch.reward[owner] * weights, weights, baselines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name, value in (("groups", 8), ("samples", 4), ("prompt", 45), ("answer", 15), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = load_model(a.model).train()
    assert isinstance(model, Decoder)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-6))
    ways: dict[str, tuple[PackedBatch, Callable[..., None]]] = {}
    for name, way in (("plain", plain), ("exact", exact)):
        trajectories = made(model, a.groups, a.samples, a.prompt, a.answer)
        packed = pack_batch(trajectories, micro_batch_tokens=1 << 20, shared=True, apart=name == "exact")
        ways[name] = packed, way
    batch = ways["plain"][0]
    weights = torch.full((batch.num_policy_tokens,), 1.0 / batch.num_policy_tokens)
    seconds: dict[str, list[float]] = {"products of plain": [], "products of exact": [], "plain": [], "exact": []}
    operations = 0.0
    for number in range(a.repeats + 1):
        spent, operations = products(shapes_of(model, batch, apart=False))
        seconds["products of plain"].append(spent)
        spent, _ = products(shapes_of(model, batch, apart=True), a.groups * a.samples)
        seconds["products of exact"].append(spent)
        for name, (packed, way) in ways.items():
            optimizer.zero_grad(set_to_none=True)
            began = time.process_time()
            way(model, packed, weights)
            optimizer.step()
            seconds[name].append(time.process_time() - began)
        if number:
            print({name: round(found[-1], 3) for name, found in seconds.items()}, flush=True)
    size = 4 * sum(p.numel() for p in model.parameters())
    micro = batch.micro_batches[0]
    counted = activation_bytes(model.config, len(micro.tokens), bfloat16=False)
    counted += log_prob_bytes(model.config, len(micro.targets))
    memory = {}
    for name, (packed, way) in ways.items():
        optimizer.zero_grad(set_to_none=True)
        memory[name] = peak_bytes(lambda p=packed, w=way: w(model, p, weights)) + 3 * size
    rows = {name: found[1:] for name, found in seconds.items()}
    result: dict[str, Any] = {
        "rows": len(micro.tokens),
        "tokens": batch.num_tokens,
        "gflops": round(operations / statistics.median(rows["products of plain"]) / 1e9, 1),
        "seconds": {name: round(statistics.median(found), 3) for name, found in rows.items()},
        "over_products": {
            name: round(
                statistics.median(x / y for x, y in zip(rows[name], rows[f"products of {name}"], strict=True)), 3
            )
            for name in ways
        },
        "memory_mb": {name: round(value / 1e6) for name, value in memory.items()},
        "counted_mb": round((4 * size + counted) / 1e6),
        "memory_over_counted": {name: round(value / (4 * size + counted), 3) for name, value in memory.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
