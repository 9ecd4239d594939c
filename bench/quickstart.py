"""How far the quickstart gets, over several seeds: held-out reward before and after, seconds. Makes nothing else.

    python bench/quickstart.py [--seeds N] [--config FILE] [name=value ...]

Each seed is what `make quickstart` does, with another seed of the model, of its warm-up and of the run: `init-model`,
then `run`, in real processes. Processor time is that of all of them; wall time says little where other work runs.

Targets: median of the held-out reward after at least 0.9, none below 0.8.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import async_rl as ar

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
UNTIL = "0.55"
"""success rate at which the Makefile's warm-up stops"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("settings", nargs="*", metavar="name=value")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    after: list[float] = []
    print("seed  before   after   wall s   processor s", flush=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory(prefix="quickstart-") as place:
            summary, wall, processor = play(Path(place), args.config, seed, args.settings)
        after.append(summary["reward_eval_last"])
        print(
            f"{seed:4}  {summary['reward_eval_first']:6.3f}  {after[-1]:6.3f}  {wall:7.1f}  {processor:7.1f}",
            flush=True,
        )
    print(f"after, {len(after)} seeds: median {statistics.median(after):.3f}, {min(after):.3f} to {max(after):.3f}")


def play(place: Path, config: Path, seed: int, settings: list[str]) -> tuple[dict[str, Any], float, float]:
    """(summary of the run, wall seconds, processor seconds), the model's warm-up included."""
    command = [sys.executable, "-m", "async_rl"]
    model, run = str(place / "model"), place / "run"
    began, used = time.monotonic(), children_s()
    for words in (
        ["init-model", model, "--task", "guess", "--until", UNTIL, "--seed", str(seed)],
        [
            "run",
            str(config),
            "--run-dir",
            str(run),
            f"seed={seed}",
            f"model.path={model}",
            "checkpoint.every=0",
            *settings,
        ],
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary = ar.Run(run).summary
    return dict(summary), time.monotonic() - began, children_s() - used


def children_s() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
