"""The kernels: rates, memory, and what they are measured beside. One call, under 8 minutes on a GPU.

    python bench/kernels.py [--only logprob,...] [--rounds 3]

On a CPU the rows for CPUs are measured and every other row says "not measured". `seconds` are CPU time of this
process (one thread) on a CPU and CUDA events on a GPU, medians of rounds in which the ways take turns; ratios
are medians of the ratios within a round. `peak_mb` is the most that torch held above what was there before,
without the gradients that are the result.
Each section has a time budget and stops at the round in which it is used up.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernels_cpu import SECTIONS as CPU_SECTIONS
from kernels_gpu import SECTIONS as GPU_SECTIONS


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--only", default="", help="sections by name, with commas")
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    chosen = [name for name in given.only.split(",") if name]
    unknown = sorted(set(chosen) - {*CPU_SECTIONS, *GPU_SECTIONS})
    if unknown:
        arguments.error(f"there is no section {unknown}; there are {[*CPU_SECTIONS, *GPU_SECTIONS]}")
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    table: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else "cpu, one thread",
        "torch": torch.__version__,
    }
    for name, section in (*CPU_SECTIONS.items(), *GPU_SECTIONS.items()):
        if chosen and name not in chosen:
            continue
        if name in GPU_SECTIONS and not gpu:
            table[name] = "not measured: no GPU"
            continue
        started = time.monotonic()
        table[name] = section(given.rounds)
        print(f"{name}: {json.dumps(table[name])} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
