"""A real model learns a real environment, as `make demo` does. Prints held-out before and after, seconds, tokens/s.

    python bench/demo.py [--config configs/demo.yaml ...] [name=value ...]

Needs models/smollm2 (`make models/smollm2`) and reasoning-gym. Each config runs in real processes, in a folder that is
removed. Processor time is that of all of them; wall time says little where other work runs on the same cores.

Target of configs/demo.yaml: from below 0.2 to above 0.8 in at most 10 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import async_rl as ar
from async_rl.observe.answers import answer_lines

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[CONFIG])
    parser.add_argument("settings", nargs="*", metavar="name=value")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("config       steps  before   after   wall s   processor s   s/step   tokens/s", flush=True)
    for config in args.config:
        with tempfile.TemporaryDirectory(prefix="demo-") as place:
            began, used = time.monotonic(), children_s()
            command = [sys.executable, "-m", "async_rl", "run", str(config), "--run-dir", f"{place}/run"]
            done = subprocess.run([*command, "checkpoint.every=0", *args.settings], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{config}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            wall, processor = time.monotonic() - began, children_s() - used
            run = ar.Run(f"{place}/run")
            s = run.summary
            print(
                f"{config.stem:<11}  {s['steps']:5}  {s['reward_eval_first']:6.3f}  {s['reward_eval_last']:6.3f}  "
                f"{wall:7.0f}  {processor:11.0f}  {s['seconds'] / s['steps']:7.1f}  "
                f"{s['tokens_trained'] / s['seconds']:9.0f}"
            )
            print("\n".join(answer_lines(s["answers"])), flush=True)


def children_s() -> float:
    """Processor time of processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
