"""Coefficients of every recipe against the forward and backward pass over the same tokens, in one process.

    python bench/objective.py [--tokens 65536] [--repeats 5]

One thread, float32 columns. Two shapes with the same number of policy tokens:
- quickstart: one turn of 8 to 20 tokens after a prompt of one token, groups of 8 (thousands of trajectories);
- multi_turn: four turns of 60 to 120 tokens with 10 environment tokens between them.
The model is that of the quickstart (2 layers, width 128, 64 tokens), forward and backward once over the packed
batch in micro-batches of 8192 tokens. Rounds take the model and every recipe in turns; `share` is the median over
rounds of coefficients / (forward + backward) within the round, in processor time. Target: no share above 0.02.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import list_recipes, load_recipe
from async_rl.objective.recipe import Recipe, requirements
from async_rl.objective.tokens import Noted
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

ARITHMETIC = ModelArithmetic(temperature=1.0)
SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {"turns": 1, "turn": (8, 21)},
    "multi_turn": {"turns": 4, "turn": (60, 121)},
}
VOCABULARY, GROUP_SIZE, ENVIRONMENT_TOKENS = 64, 8, 10


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=65536)
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: measure(shape, given.tokens, given.repeats) for name, shape in SHAPES.items()}
    result["largest_share"] = max(shape["share"][shape["slowest"]] for shape in result.values())
    print(json.dumps(result | {"target": 0.02, "threads": 1, "torch": torch.__version__}, indent=2))


def measure(shape: dict[str, Any], tokens: int, repeats: int) -> dict[str, Any]:
    model, batch = make_model(), make_batch(shape, tokens)
    columns = make_columns(batch)
    recipes = {name: load_recipe({"name": name}) for name in list_recipes()}
    needed = {name: only_needed(columns, recipe) for name, recipe in recipes.items()}
    passes: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(repeats + 1):
        started = time.process_time()
        forward_backward(model, batch)
        passes.append(time.process_time() - started)
        for name, recipe in recipes.items():
            started = time.process_time()
            coefficients(needed[name], recipe, ObjectiveState())
            spent[name].append(time.process_time() - started)
    share = {  # the first round warms up
        name: statistics.median(a / b for a, b in zip(values[1:], passes[1:], strict=True))
        for name, values in spent.items()
    }
    return {
        "policy_tokens": batch.num_policy_tokens,
        "tokens": batch.num_tokens,
        "trajectories": batch.num_trajectories,
        "forward_backward_s": round(statistics.median(passes[1:]), 3),
        "coefficients_ms": {name: round(1e3 * statistics.median(values[1:]), 1) for name, values in spent.items()},
        "share": {name: round(value, 5) for name, value in share.items()},
        "slowest": max(share, key=lambda name: share[name]),
    }


def forward_backward(model: Decoder, batch: PackedBatch) -> None:
    model.zero_grad(set_to_none=True)
    for micro in batch.micro_batches:
        (-log_probs(model, micro, ARITHMETIC).log_prob.mean()).backward()


# ------------------------------------------------------------- model, batch and columns


def make_model() -> Decoder:
    config = DecoderConfig(
        family="qwen3", vocabulary=VOCABULARY, hidden=128, intermediate=384, layers=2, heads=4, kv_heads=2,
        head_dim=32, max_context=1024, qk_norm=True, tied=True,
    )  # fmt: skip
    model = Decoder(config)
    model.initialise(0)
    return model


def make_batch(shape: dict[str, Any], tokens: int) -> PackedBatch:
    random = np.random.default_rng(0)
    made: list[Trajectory] = []
    policy_tokens = 0
    while policy_tokens < tokens:
        turns, position = [], 1
        for _ in range(shape["turns"]):
            length = int(random.integers(*shape["turn"]))
            turns.append(Turn(start=position, length=length, reward=float(random.random())))
            position += length + ENVIRONMENT_TOKENS
            policy_tokens += length
        end = turns[-1].start + turns[-1].length
        made.append(
            Trajectory(
                group=len(made) // GROUP_SIZE,
                sample=len(made) % GROUP_SIZE,
                problem=0,
                split="train",
                seed=len(made),
                tokens=random.integers(0, VOCABULARY, end).astype(np.int32),
                log_behaviour=np.zeros(end, np.float32),
                turns=tuple(turns),
                versions=(VersionSpan(version=int(random.integers(0, 5)), start=1, end=end),),
                reward=float(random.integers(0, 2)),
                ended="finished",
            )
        )
    return pack_batch(made, micro_batch_tokens=8192)


def make_columns(batch: PackedBatch) -> Columns:
    """Log-probs as a policy a few steps on would have them."""
    random = torch.Generator().manual_seed(0)
    n = batch.num_policy_tokens
    log_prob = -torch.rand(n, generator=random) * 2

    def near(spread: float) -> torch.Tensor:
        return log_prob + spread * torch.randn(n, generator=random)

    return Columns(
        log_prob=log_prob,
        log_behaviour=near(0.1),
        version=batch.version,
        turn_of_token=batch.turn_of_token,
        trajectory_of_turn=batch.trajectory_of_turn,
        group_of_trajectory=batch.group_of_trajectory,
        reward=batch.reward,
        turn_reward=batch.turn_reward,
        state_key=torch.randint(0, 4, batch.state_key.shape, generator=random),
        truncated=batch.truncated,
        current_version=4,
        log_proximal=log_prob,
        log_reference=near(0.5),
        value=torch.randn(n, generator=random),
        entropy=-log_prob,
        prob_square_sum=log_prob.exp(),
        log_teacher=near(0.5),
        log_proxy=near(0.1),
        median=torch.randn(n, generator=random),
        turn_values=torch.randn(n, 4, generator=random),
        turn_values_slow=torch.randn(n, 4, generator=random),
        forks=forks_of(batch),
        greedy=torch.arange(batch.num_trajectories) % GROUP_SIZE == 0,
        noted=Noted(trajectory={"answer": torch.randint(0, 5, (batch.num_trajectories,), generator=random).double()}),
    )


def forks_of(batch: PackedBatch) -> torch.Tensor:
    """Half of each group goes on from the other half, behind the first tokens."""
    place = torch.arange(batch.num_trajectories)
    within = place % GROUP_SIZE
    fork = within >= GROUP_SIZE // 2
    parent = torch.where(fork, place - GROUP_SIZE // 2, -1)
    return torch.stack([parent, fork.long() * 3], 1)


def only_needed(columns: Columns, recipe: Recipe) -> Columns:
    """The columns a trainer would hand to this recipe."""
    need = requirements(recipe)
    return replace(
        columns,
        log_reference=columns.log_reference if need.reference else None,
        value=columns.value if need.value else None,
        log_teacher=columns.log_teacher if need.teacher else None,
        log_proxy=columns.log_proxy if need.proxy_share else None,
        prob_square_sum=columns.prob_square_sum if need.prob_square_sum else None,
    )


if __name__ == "__main__":
    main()
