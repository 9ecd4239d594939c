"""Exact OPOB with packing kept: time and memory against the alternatives, in one process.

    python bench/opob.py [--repeats 9]

Three ways to a policy gradient over the same batch, taken in turns, one thread, float32:
- group_mean: the packed batch, ordinary forward and backward (the baseline needs no gradient);
- exact: the same packing, norms of all trajectories' gradients, the optimal baseline, the gradient;
- one_by_one: a forward and a backward for each trajectory and two gradient sums, as VCPO's reference does it.
Optimizer and objective, the same for all, are left out, so ratios are those of the part that differs.
Seconds are CPU time of this one-threaded process (a busy machine disturbs it less), medians; ratios are
medians of the ratios within a round. `peak_mb` is the most that torch held above what was there before the
step, which starts without any `.grad`; `extra_copies` is exact less group_mean in copies of the gradient.
`agreement` is the relative difference of exact and one_by_one.
Targets: exact <= 1.35 group_mean, one_by_one >= 3 exact, extra_copies <= 1.1. The second can be met only
where trajectories are short: what packing saves on a CPU is the cost of calls, and from about a hundred tokens
on a single trajectory keeps a core busy, so that group_mean itself gains nothing over one_by_one.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peak import peak_bytes
from torch import Tensor

from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl.trajectory import Trajectory, Turn, VersionSpan

ARITHMETIC = ModelArithmetic(temperature=1.0)
GROUP_SIZE = 16
CASES: dict[str, dict[str, Any]] = {
    # the quickstart's guessing game: `?15<07>11=`, two to five guesses
    "quickstart": {
        "layers": 2, "hidden": 128, "intermediate": 384, "heads": 4, "vocabulary": 20,
        "trajectories": 256, "prompt": (1, 2), "turns": (2, 6), "answer": (2, 3), "reply": 1,
    },
    "twenty_tokens": {
        "layers": 2, "hidden": 128, "intermediate": 384, "heads": 4, "vocabulary": 64,
        "trajectories": 256, "prompt": (4, 9), "turns": (1, 2), "answer": (8, 20), "reply": 0,
    },
    "longer": {
        "layers": 4, "hidden": 256, "intermediate": 768, "heads": 4, "vocabulary": 512,
        "trajectories": 64, "prompt": (28, 41), "turns": (1, 2), "answer": (100, 160), "reply": 0,
    },
    "longer_cut_inside_groups": {
        "layers": 4, "hidden": 256, "intermediate": 768, "heads": 4, "vocabulary": 512,
        "trajectories": 64, "prompt": (28, 41), "turns": (1, 2), "answer": (100, 160), "reply": 0,
        "micro_batch_tokens": 4000,
    },
}  # fmt: skip
"""ranges are [least, most + 1) tokens or turns"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=9)
    repeats = arguments.parse_args().repeats
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: measure(case, repeats) for name, case in CASES.items()}
    print(json.dumps(result | {"threads": 1, "torch": torch.__version__}, indent=2))


def measure(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    model = make_model(case)
    batch = make_batch(case, case.get("micro_batch_tokens", 1 << 20))
    single = make_batch(case, 1)
    weights = make_weights(batch)
    steps: dict[str, Callable[[], Any]] = {
        "group_mean": lambda: group_mean(model, batch, weights),
        "exact": lambda: exact(model, batch, weights),
        "one_by_one": lambda: one_by_one(model, single, weights),
    }
    rounds = seconds_in_turns(model, steps, repeats)
    memory = {name: step_peak(model, steps[name]) for name in ("group_mean", "exact")}
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "tokens": batch.num_tokens,
        "trajectories": batch.num_trajectories,
        "micro_batches": len(batch.micro_batches),
        "parameters": copy // 4,
        "seconds": {name: round(statistics.median(values), 4) for name, values in rounds.items()},
        "exact_over_group_mean": ratio(rounds["exact"], rounds["group_mean"]),
        "one_by_one_over_exact": ratio(rounds["one_by_one"], rounds["exact"]),
        "peak_mb": {name: round(value / 1e6, 2) for name, value in memory.items()},
        "gradient_copy_mb": round(copy / 1e6, 2),
        "extra_copies": round((memory["exact"] - memory["group_mean"]) / copy, 2),
        "agreement": disagreement(model, batch, single, weights),
    }


def seconds_in_turns(model: Decoder, steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor time of each step in each round; none of them finds a `.grad`."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            model.zero_grad(set_to_none=True)
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in seconds.items()}  # the first warms up


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


# ------------------------------------------------------------- the three ways


def group_mean(model: Decoder, batch: PackedBatch, weights: Tensor) -> None:
    coefficients = (batch.reward - mean_of_group(batch.reward, batch))[owner_of(batch)] * weights
    for micro in batch.micro_batches:
        (-(coefficients[micro.policy] * log_probs(model, micro, ARITHMETIC).log_prob).sum()).backward()


def exact(model: Decoder, batch: PackedBatch, weights: Tensor) -> Tensor:
    policy = batch.reward[owner_of(batch)] * weights
    return TrajectoryGradient(model, ARITHMETIC).add(
        batch, policy, weights, lambda norm_squares: optimal(norm_squares, batch)
    )


def one_by_one(model: Decoder, single: PackedBatch, weights: Tensor) -> Tensor:
    """Two sums per group, baseline taken off when the group is complete."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    of_reward = [torch.zeros_like(p) for p in parameters]
    of_one = [torch.zeros_like(p) for p in parameters]
    squares = torch.zeros(single.num_trajectories, dtype=torch.float64)
    group = single.group_of_trajectory.tolist()
    for i, micro in enumerate(single.micro_batches):
        loss = -(weights[micro.policy] * log_probs(model, micro, ARITHMETIC).log_prob).sum()
        gradients = torch.autograd.grad(loss, parameters)
        squares[i] = torch.nn.utils.get_total_norm(gradients) ** 2
        torch._foreach_add_(of_reward, gradients, alpha=float(single.reward[i]))
        torch._foreach_add_(of_one, gradients)
        if i + 1 == len(group) or group[i + 1] != group[i]:
            torch._foreach_add_(of_reward, of_one, alpha=-float(optimal(squares, single)[group[i]]))
            torch._foreach_add_(total, of_reward)
            torch._foreach_zero_(of_reward)
            torch._foreach_zero_(of_one)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return squares


def optimal(norm_squares: Tensor, batch: PackedBatch) -> Tensor:  # [groups]
    group, groups = batch.group_of_trajectory, int(batch.group_of_trajectory[-1]) + 1
    zero = torch.zeros(groups, dtype=torch.float64, device=group.device)
    return zero.index_add(0, group, norm_squares * batch.reward) / zero.index_add(0, group, norm_squares)


def mean_of_group(values: Tensor, batch: PackedBatch) -> Tensor:  # [trajectories]
    return values.view(-1, GROUP_SIZE).mean(1)[batch.group_of_trajectory]


def owner_of(batch: PackedBatch) -> Tensor:  # [policy tokens], its trajectory
    return batch.trajectory_of_turn[batch.turn_of_token]


def disagreement(model: Decoder, batch: PackedBatch, single: PackedBatch, weights: Tensor) -> dict[str, float]:
    """Relative difference of exact and one_by_one, in float32."""
    found = []
    for step in (lambda: exact(model, batch, weights), lambda: one_by_one(model, single, weights)):
        model.zero_grad(set_to_none=True)
        squares = step()
        found.append((squares, gradient_of(model)))
    (squares, gradient), (squares_of_each, gradient_of_each) = found
    return {
        "norm_squares": float(((squares - squares_of_each) / squares_of_each).abs().max()),
        "gradient": float((gradient - gradient_of_each).norm() / gradient_of_each.norm()),
    }


def gradient_of(model: Decoder) -> Tensor:  # [parameters]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step_peak(model: Decoder, step: Callable[[], Any]) -> int:
    """Bytes that torch holds at most during `step`, gradients included."""
    model.zero_grad(set_to_none=True)
    return peak_bytes(step)


# ------------------------------------------------------------- model and batch


def make_model(case: dict[str, Any]) -> Decoder:
    model = Decoder(
        DecoderConfig(
            family="qwen3",
            vocabulary=case["vocabulary"],
            hidden=case["hidden"],
            intermediate=case["intermediate"],
            layers=case["layers"],
            heads=case["heads"],
            kv_heads=case["heads"] // 2,
            head_dim=case["hidden"] // case["heads"],
            max_context=256,
            qk_norm=True,
            tied=True,
        )
    )
    model.initialise(0)
    return model


def make_batch(case: dict[str, Any], micro_batch_tokens: int, device: str = "cpu") -> PackedBatch:
    return pack_batch(trajectories_of(case), micro_batch_tokens=micro_batch_tokens, device=device)


def trajectories_of(case: dict[str, Any]) -> list[Trajectory]:
    random = np.random.default_rng(0)
    made = []
    for i in range(case["trajectories"]):
        start, turns = int(random.integers(*case["prompt"])), []
        for _ in range(int(random.integers(*case["turns"]))):
            turns.append(Turn(start=start, length=int(random.integers(*case["answer"]))))
            start += turns[-1].length + case["reply"]
        made.append(
            Trajectory(
                group=i // GROUP_SIZE,
                sample=i % GROUP_SIZE,
                problem=0,
                split="train",
                seed=i,
                tokens=random.integers(0, case["vocabulary"], start).astype(np.int32),
                log_behaviour=np.zeros(start, np.float32),
                turns=tuple(turns),
                versions=(VersionSpan(version=0, start=0, end=start),),
                reward=float(random.integers(0, 2)),
                ended="finished",
            )
        )
    return made


def make_weights(batch: PackedBatch) -> Tensor:  # [policy tokens]
    """Importance weights between 1/2 and 2, over length and number of trajectories."""
    random = torch.Generator().manual_seed(0)
    weight = (2 * torch.rand(batch.num_trajectories, generator=random) - 1).exp2().to(batch.reward.device)
    length = torch.bincount(owner_of(batch), minlength=batch.num_trajectories)
    return (weight / length / batch.num_trajectories)[owner_of(batch)]


if __name__ == "__main__":
    main()
