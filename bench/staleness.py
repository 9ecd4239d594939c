"""What bounding staleness is worth on the quickstart's task, and what each way to bound it costs. Prints one
JSON object.

    python bench/staleness.py [--model DIR] [--steps N] [--seed N] [name=value ...]
    python bench/staleness.py --policies [--model DIR] [--steps N] [--seed N] [name=value ...]

The same run twice, real processes, same seed and same model: once with staleness bounded at one step, once
with 16 steps allowed and the pipeline as deep as that permits. The recipe is GRPO, whose clip keeps stale
data from doing harm but does not make them worth as much as fresh ones; other settings can be given, such as
`recipe=reinforce_tis`, or `recipe.ratio.level=none recipe.trust.rule=none` for no correction at all. Without
--model a model is made and warmed up as the quickstart's.

With --policies: pace, wait and drop under the same bound, two generators, on episodes of mixed length (up to 12
guesses instead of 5): reward, throughput, staleness, who was waited for, what was discarded and how much longer that
was than what was trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from async_rl.config import load_settings
from async_rl.observe.console import Console
from async_rl.run.init_model import Shape, WarmupOptions, init_model
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
RECIPE = "recipe=grpo"
WAYS = {"bounded": (1, 2), "loose": (16, 17)}
"""max_staleness and pipeline_depth"""


POLICIES = ("pace", "wait", "drop")
MIXED = (
    "task.args.max_turns=12",
    "generator.count=2",
    "staleness.max_staleness=2",
    "staleness.pipeline_depth=0",
)
"""the comparison of policies: long and short episodes, generators as far ahead as the bound lets them"""


def make_model(path: Path, seed: int) -> None:
    """As `make quickstart` does."""
    torch.manual_seed(seed)
    options = WarmupOptions(target=0.4, max_steps=1000, batch=64, learning_rate=1e-3, check_every=25, seed=seed)
    init_model(path, make_task("guess", {}), Shape(), options, print)


def train(folder: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One run: what it reached, and how stale its data were; and its whole summary."""
    summary = run_training(load_settings(CONFIG, overrides), folder, console=Console(quiet=True))
    rewards = [row["reward/mean"] for row in read_rows(RunFolder(folder).metrics)]
    last = max(1, len(rewards) // 10)
    keys = ("lag_mean", "lag_max", "max_staleness", "reward_eval_first", "reward_eval_last", "seconds")
    found = {
        **{key: round(summary[key], 4) for key in keys},
        "reward_train_last_tenth": round(statistics.fmean(rewards[-last:]), 4),
    }
    return found, dict(summary)


def what_it_cost(summary: dict[str, Any]) -> dict[str, Any]:
    """Throughput, waits for slow groups, and what was discarded."""
    held, dropped, seconds = summary["held_up"], summary["dropped"], max(summary["seconds"], 1e-9)
    generated = max(1, summary["tokens_generated"])
    return {
        "tokens_trained_per_s": round(summary["tokens_trained"] / seconds),
        "tokens_trained_share": round(summary["tokens_trained"] / generated, 4),
        "overlap_efficiency": round(summary["overlap_efficiency"], 4),
        "ess_mean": round(summary["ess_mean"], 4),
        "batches_held_up": int(held.get("batches", 0)),
        "seconds_held_up": round(held.get("seconds", 0.0), 3),
        "groups_discarded": int(dropped.get("groups", 0)),
        "tokens_discarded": int(dropped.get("tokens", 0)),
        "length_bias": round(dropped["len_bias"], 4) if "len_bias" in dropped else None,
    }


def common(model: Path, arguments: argparse.Namespace) -> list[str]:
    """Settings of every run."""
    return [
        f"model.path={model}",
        f"seed={arguments.seed}",
        f"trainer.steps={arguments.steps}",
        "evaluation.every=0",
        "checkpoint.every=0",
        RECIPE,
    ]


def compare_bounds(folder: Path, shared: list[str], overrides: list[str]) -> dict[str, Any]:
    """Staleness bounded at one step, and next to unbounded."""
    runs = {}
    for way, (staleness, depth) in WAYS.items():
        bound = [f"staleness.max_staleness={staleness}", f"staleness.pipeline_depth={depth}"]
        runs[way], _ = train(folder / way, [*shared, *bound, *overrides])
    return {
        **{f"{way}_{key}": value for way, run in runs.items() for key, value in run.items()},
        "reward_gained_by_bounding": round(runs["bounded"]["reward_eval_last"] - runs["loose"]["reward_eval_last"], 4),
    }


def compare_policies(folder: Path, shared: list[str], overrides: list[str]) -> dict[str, Any]:
    """The three ways to keep one bound."""
    result = {}
    for policy in POLICIES:
        run, summary = train(folder / policy, [*shared, *MIXED, f"staleness.policy={policy}", *overrides])
        result |= {f"{policy}_{key}": value for key, value in {**run, **what_it_cost(summary)}.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", action="store_true", help="compare pace, wait and drop")
    parser.add_argument("--model", type=Path, help="model folder (default: one is made)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="name=value, laid over configs/quickstart.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        model = arguments.model
        if model is None:
            model = Path(name) / "model"
            make_model(model, arguments.seed)
        compare = compare_policies if arguments.policies else compare_bounds
        found = compare(Path(name), common(model, arguments), arguments.overrides)
    result = {
        **found,
        "settings": " ".join([RECIPE, *(MIXED if arguments.policies else ()), *arguments.overrides]),
        "steps": arguments.steps,
        "seed": arguments.seed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
