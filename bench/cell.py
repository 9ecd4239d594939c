"""What one cell of the lab costs: 160 steps x 64 trajectories of the quickstart model and task, on one core.

    python bench/cell.py                 # GRPO and VCPO at lags 0, 64, 128; a minute on a quiet core
    python bench/cell.py --recipe cispo --lag 64 --model runs/lab/models/sort-w0 --task sort

Two times of the same cell: alone, and as it is in a lab, where cells of one replicate share what version 0
sampled. Processor time, since a lab uses as many processes as there are cores; imports are not counted.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import time

import torch

from async_rl.config import Settings
from async_rl.config.schema import structured
from async_rl.instruments.lab.cell import run_cell
from async_rl.instruments.lab.exact_lag import FirstBatches
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements

STEPS, GROUPS, SAMPLES = 160, 8, 8


def settings_of(args: argparse.Namespace, recipe: str, lag: int, steps: int) -> Settings:
    values = {
        "name": "cell",
        "model": {"path": args.model},
        "task": {"name": args.task},
        "recipe": {"name": recipe},
        "staleness": {"max_staleness": lag},
        "batch": {"groups_per_step": GROUPS, "group_size": SAMPLES},
        "trainer": {"steps": steps},
        "optimizer": {"learning_rate": 2.5e-4, "warmup_steps": 10},
    }
    if requirements(load_recipe({"name": recipe})).value:
        values["critic"] = {"kind": "head", "warmup_steps": 10}
    return structured(Settings, values, where="run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/quickstart")
    parser.add_argument("--task", default="guess")
    parser.add_argument("--recipe", nargs="+", default=["grpo", "vcpo"])
    parser.add_argument("--lag", nargs="+", type=int, default=[0, 64, 128])
    args = parser.parse_args()
    torch.set_num_threads(1)
    run_cell(settings_of(args, args.recipe[0], 1, 3), reward_first=0.0)  # imports on first use
    print(f"{STEPS} steps x {GROUPS * SAMPLES} trajectories, {args.task}, {args.model}")
    print("recipe        lag   alone s   in a lab s   wall s   reward")
    for recipe in args.recipe:
        first = FirstBatches()
        for lag in sorted(args.lag):
            cost = []
            for _ in range(2):
                wall, processor = time.monotonic(), time.process_time()
                numbers, _ = run_cell(settings_of(args, recipe, lag, STEPS), reward_first=0.0, first=first)
                cost.append((time.process_time() - processor, time.monotonic() - wall))
                if lag == 0:
                    break
            alone, shared = cost[0][0], cost[-1][0]
            print(
                f"{recipe:12s} {lag:4d} {alone:9.1f} {shared:12.1f} {cost[-1][1]:8.1f} {numbers['reward_final']:8.3f}"
            )
            first = FirstBatches()


if __name__ == "__main__":
    main()
