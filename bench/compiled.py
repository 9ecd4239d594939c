"""`trainer.compile`: forward and backward of packed documents with compiled layers beside plain ones, on a CPU.

    python bench/compiled.py [--rounds 5]

One thread, float32, the ways taken in turns; processor time, medians of the ratios within a round. `seconds to compile`
is that of the first two steps, less two ordinary ones.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import time
from typing import Any

import opob
import torch

from async_rl.model.decoder import LayerExecution
from async_rl.trainer.forward import log_probs

WAYS = {"plain": LayerExecution(), "compiled": LayerExecution(compiled=True)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    cases = {name: opob.CASES[name] for name in ("twenty_tokens", "longer")}
    print(json.dumps({name: measure(case, rounds) for name, case in cases.items()}, indent=2))


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    batch = opob.make_batch(case, 4000)
    weights = opob.make_weights(batch)
    models = {way: opob.make_model(case) for way in WAYS}
    gradients = {}
    for way, model in models.items():
        model.set_execution(WAYS[way])

    def step(way: str) -> float:
        model = models[way]
        model.zero_grad(set_to_none=True)
        started = time.process_time()
        for micro in batch.micro_batches:
            (-(weights[micro.policy] * log_probs(model, micro, opob.ARITHMETIC).log_prob).sum()).backward()
        seconds = time.process_time() - started
        gradients[way] = opob.gradient_of(model)
        return seconds

    first = {way: step(way) + step(way) for way in WAYS}
    times = {way: [] for way in WAYS}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for way in WAYS:
            times[way].append(step(way))
    plain = statistics.median(times["plain"])
    difference = (gradients["plain"] - gradients["compiled"]).norm() / gradients["plain"].norm()
    return {
        "tokens": batch.num_tokens,
        "plain_s": round(plain, 3),
        "compiled_over_plain": opob.ratio(times["compiled"], times["plain"]),
        "seconds to compile": round(first["compiled"] - 2 * statistics.median(times["compiled"]), 1),
        "gradients differ by": float(f"{float(difference):.1g}"),
    }


if __name__ == "__main__":
    main()
