"""Exact OPOB over two ranks (gloo): a step with exact baselines beside one with the mean of each group.

    python bench/opob_ranks.py [--rounds 5] [--sharding none,full]

One thread a rank, float32, the ways taken in turns. Both have the forward for the log-probs of the batch before it. In
processor time of a rank (a busy machine disturbs it less), median of the ratios within a round, of the slower rank.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import opob
import torch
from torch import Tensor

from async_rl.trainer.forward import batch_log_probs, log_probs
from async_rl.trainer.packing import PackedBatch, pack_batch
from async_rl.trainer.ranks import Ranks, free, gather_head, join_ranks, sum_gradients
from async_rl.trainer.sharding import shard
from async_rl.trainer.shares import Cost, Spread
from async_rl.trainer.trajectory_gradient import TrajectoryGradient

try:
    from async_rl.trainer.exact_over_ranks import add_over_ranks
except ImportError:  # before it had a file of its own
    from async_rl.trainer.trajectory_gradient import add_over_ranks  # type: ignore[attr-defined, no-redef]

CASE = {**opob.CASES["longer"], "trajectories": 32}
"""two groups of 16 trajectories of some 165 tokens: 2,640 a group"""
LIMITS = {"a group in a micro-batch": 3000, "a group in a round": 1500, "a group in several rounds": 900}
SIZE = 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--sharding", default="none,full")
    given_words = arguments.parse_args()
    rounds, shardings = given_words.rounds, given_words.sharding.split(",")
    if "RANK" in os.environ:
        with join_ranks("cpu", 600.0) as ranks:
            print(json.dumps(measure(ranks, rounds, shardings)))
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--rounds", str(rounds), "--sharding", given_words.sharding]
    processes = [
        subprocess.Popen(command, env={**os.environ, **given, "RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(SIZE)
    ]
    of_rank = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    print(json.dumps({name: {k: max(r[name][k] for r in of_rank) for k in of_rank[0][name]} for name in of_rank[0]}))


def measure(ranks: Ranks, rounds: int, shardings: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for sharding in shardings:
        model = opob.make_model(CASE)
        if sharding == "full":
            shard(model, ranks, dtype=torch.float32)
        for name, limit in LIMITS.items():
            batch = spread(ranks, limit)
            weights = opob.make_weights(batch)
            ways = {way.__name__: partial(way, model, batch, weights, ranks) for way in (group_mean, exact)}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds + 1):
                for way, step in ways.items():
                    times[way].append(seconds(model, step))
            pairs = [b / a for a, b in zip(times["group_mean"][1:], times["exact"][1:], strict=True)]
            found[f"{name}, sharding {sharding}"] = {
                "exact_over_group_mean": round(statistics.median(pairs), 3),
                "micro_batches": float(len(batch.micro_batches)),
                "group_mean_s": round(statistics.median(times["group_mean"][1:]), 3),
            }
    return found


def spread(ranks: Ranks, limit: int) -> PackedBatch:
    made = opob.trajectories_of(CASE)
    cost = Cost(per_token=2 * 3_000_000, per_policy_token=2 * 512 * 256, per_pair=4 * 4 * 256)
    over = Spread(rank=ranks.rank, size=ranks.size, cost=cost, whole_groups=True)
    return pack_batch(made, micro_batch_tokens=limit, over=over)


def group_mean(model: Any, batch: PackedBatch, weights: Tensor, ranks: Ranks) -> None:
    coefficients = batch.own((batch.reward - opob.mean_of_group(batch.reward, batch))[opob.owner_of(batch)] * weights)
    batch_log_probs(model, batch, opob.ARITHMETIC)
    for micro in batch.micro_batches:
        found = log_probs(model, micro, opob.ARITHMETIC).log_prob
        gather_head(model)
        (-(micro.rows(coefficients) * found).sum()).backward()
    end(model, ranks)


def exact(model: Any, batch: PackedBatch, weights: Tensor, ranks: Ranks) -> None:
    policy = batch.reward[opob.owner_of(batch)] * weights
    batch_log_probs(model, batch, opob.ARITHMETIC)
    norms = partial(opob.optimal, batch=batch)
    add_over_ranks(TrajectoryGradient(model, opob.ARITHMETIC), batch, policy, weights, norms, ranks, scope="group")
    end(model, ranks)


def end(model: Any, ranks: Ranks) -> None:
    free(model)
    sum_gradients(list(model.parameters()), ranks)


def seconds(model: Any, step: Callable[[], None]) -> float:
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    step()
    return time.process_time() - started


if __name__ == "__main__":
    main()
