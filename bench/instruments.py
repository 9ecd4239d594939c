"""What the instruments of a run cost, as a share of its step. Prints one JSON object. About two minutes.

    python bench/instruments.py [--model models/quickstart] [--steps N]

1. Inside the trainer, which waits for them: metric row, events, the watch for a collapse. Steps on one stored batch,
   in this process, alternately with and without them; median of the differences of neighbours.
2. Beside it, on the same cores: the process of the trackers (TensorBoard) and a `top` that looks every second. One
   real run of the quickstart's shape; both are stopped (SIGSTOP) in every second block of steps; median of the
   differences of neighbouring blocks, wall time a step.

What a run does for its own sake is not counted: checkpoints, the store, signs of life, checksums of weights. Traces are
made from the run folder afterwards (`async-rl trace`). Target: both together at most 2 % of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from async_rl.buffer.store import StoreReader
from async_rl.config import Settings, check
from async_rl.config.schema import load_yaml, structured, to_yaml, with_overrides
from async_rl.errors import check_trackers
from async_rl.events import CheckpointSaved
from async_rl.run_folder import RunFolder, append_row, read_rows
from async_rl.trainer.alarm import Guard
from async_rl.trainer.build import make_learner
from async_rl.trainer.packing import pack_step
from async_rl.trajectory.codec import unpack

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SKIPPED = 10
"""steps at the start of the run that are not counted"""
BLOCK = 6
"""steps of the run between a stop and a start of the observers"""
LONGEST_S = 200.0
LOOK = """
import io, sys, time
from pathlib import Path
from rich.console import Console
from async_rl.observe.top import EVERY_S, RunPoller, render

poller = RunPoller(Path(sys.argv[1]))
while True:
    Console(file=io.StringIO(), width=140).print(render(poller.poll(), 140, time.time()))
    time.sleep(EVERY_S)
"""


def settings_for(model: Path, *overrides: str) -> Settings:
    chosen = [f"model.path={model}", "checkpoint.every=0", "evaluation.every=0", "evaluation.problems=8", *overrides]
    settings = structured(Settings, with_overrides(load_yaml(CONFIG), chosen), where="")
    check(settings)
    return settings


def beside(settings: Settings, path: Path) -> tuple[dict[str, Any], RunFolder]:
    """The run, its observers stopped in every second block."""
    path.mkdir()
    config, folder = path / "config.yaml", RunFolder(path / "run")
    config.write_text(to_yaml(settings))
    run = [sys.executable, "-m", "async_rl", "run", str(config), "--run-dir", str(folder.path)]
    launcher = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + LONGEST_S
    observers: list[int] = []
    top: subprocess.Popen[bytes] | None = None
    marks: list[tuple[int, bool]] = []
    """(first step of a block, observers at work)"""
    try:
        while launcher.poll() is None and time.monotonic() < deadline:
            done = sum(1 for _ in read_rows(folder.metrics))
            if top is None and done:
                top = _top(folder)
                observers = [top.pid, *_trackers(folder)]
            if observers and done >= SKIPPED and (not marks or done - marks[-1][0] >= BLOCK):
                working = not marks[-1][1] if marks else False
                _signal(observers, signal.SIGCONT if working else signal.SIGSTOP)
                marks.append((done, working))
            time.sleep(0.02)
    finally:
        _signal(observers, signal.SIGCONT)
        if top is not None:
            top.terminate()
            top.wait()
        if launcher.poll() is None:
            launcher.terminate()
        launcher.wait()
    return _compared(folder, marks), folder


def _top(folder: RunFolder) -> subprocess.Popen[bytes]:
    """What `top` does in a terminal."""
    return subprocess.Popen([sys.executable, "-c", LOOK, str(folder.path)])


def _signal(some: Sequence[int], number: signal.Signals) -> None:
    for pid in some:
        with suppress(ProcessLookupError):  # the tracker ends with the run
            os.kill(pid, number)


def _trackers(folder: RunFolder) -> list[int]:
    return [row["pid"] for row in read_rows(folder.events) if row["event"] == "started" and row["process"] == "tracker"]


def _compared(folder: RunFolder, marks: Sequence[tuple[int, bool]]) -> dict[str, Any]:
    """Neighbouring blocks; the step in which observers were stopped or started belongs to none."""
    ended = {int(row["step"]): float(row["time"]) for row in read_rows(folder.metrics)}
    blocks = []
    for (first, working), (end, _) in pairwise(marks):
        if end - first >= 3 and {first, end - 1} <= ended.keys():
            blocks.append(((ended[end - 1] - ended[first]) / (end - 1 - first), working))
    pairs = [(a if on else b) - (b if on else a) for (a, on), (b, _) in zip(blocks[::2], blocks[1::2], strict=False)]
    step = statistics.median(seconds for seconds, working in blocks if not working)
    return {"ms a step": 1000 * step, "ms more": 1000 * statistics.median(pairs), "pairs of blocks": len(pairs)}


def inside(settings: Settings, folder: RunFolder, out: RunFolder, steps: int) -> dict[str, Any]:
    """Steps on one batch of the run, with and without what the loop writes around them."""
    torch.set_num_threads(settings.trainer.threads)
    learner, guard = make_learner(settings), Guard(settings.guard, out)
    with StoreReader(folder.store) as store:
        episodes = [unpack(blob) for blob in store.load_batch(0) or ()]
    like = list(read_rows(folder.metrics))[-1]  # a row of a real step: as many numbers
    differences, plain = [], []
    for number in range(steps + 2):
        seconds = []
        for watched in (number % 2 == 0, number % 2 == 1):  # which one is first changes
            started = time.perf_counter()
            report = learner.step(pack_step(settings, episodes))
            if watched:
                step = number
                guard.report(guard.check({"step": step, **report.metrics}))
                row = {**like, **report.metrics, "step": step, "time": time.time(), **guard.columns()}
                append_row(out.metrics, row)
                if step % 10 == 0:
                    out.record(CheckpointSaved(version=step, path="", seconds=0.0))
            seconds.append((time.perf_counter() - started, watched))
        if number >= 2:  # the first touch memory
            with_, without = (next(s for s, w in seconds if w is on) for on in (True, False))
            differences.append(with_ - without)
            plain.append(without)
    return {
        "ms a step": 1000 * statistics.median(plain),
        "ms more": 1000 * statistics.median(differences),
        "pairs of steps": len(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=Path("models/quickstart"))
    parser.add_argument("--steps", type=int, default=200, help="of the run; the pairs inside the trainer are a third")
    arguments = parser.parse_args()
    check_trackers(["tensorboard"])
    settings = settings_for(arguments.model, f"trainer.steps={arguments.steps}", "trackers=[tensorboard]")
    with tempfile.TemporaryDirectory() as made:
        outside, folder = beside(settings, Path(made) / "beside")
        out = RunFolder(Path(made) / "inside")
        out.create(settings)
        within = inside(settings, folder, out, max(10, arguments.steps // 3))
    share = within["ms more"] / within["ms a step"] + outside["ms more"] / outside["ms a step"]
    found = {
        "inside the trainer": within | {"share": within["ms more"] / within["ms a step"]},
        "beside it": outside | {"share": outside["ms more"] / outside["ms a step"]},
        "share of a step": share,
        "target": 0.02,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
