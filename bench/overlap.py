"""What running generation and training side by side saves. Prints one JSON object.

    python bench/overlap.py [--steps N] [--rounds R] [--pinned]

Two runs of real processes on a model made for it: one asynchronous (the trainer works on one batch while
the next ones are generated), one with `max_staleness=0` (strictly one after the other). First the two sides
are balanced in this process: the sequences decoded at once are chosen such that generating a batch takes as
long as training on it. The learning rate is so small that episodes keep their lengths.

`--pinned`: each side has a core of its own (`pin_threads`), as each has its own GPU elsewhere. Without it a synchronous
trainer uses both cores while nothing is generated, so less can be saved: 1.5 times at most where both sides take a
core as long.

Targets: asynchronous time a step <= 1.1 x max(generating, training), and >= 1.6 x faster than synchronous.
Seconds generating are those with sequences in hand; the first steps of each run are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from async_rl.config import Settings, check
from async_rl.config.schema import structured
from async_rl.generator.build import make_engine
from async_rl.instruments.synchronous import tickets_of
from async_rl.model.create import create_model_folder
from async_rl.model.decoder import Decoder
from async_rl.model.folder import load_model, save_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.observe.console import Console
from async_rl.run.evaluate import Limits, sample_episodes
from async_rl.run.init_model import WarmupOptions, warm_up
from async_rl.run.launcher import run_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task
from async_rl.task.order import PromptOrder
from async_rl.trainer.build import make_learner
from async_rl.trainer.packing import pack_step

SKIPPED = 6
"""steps at the start of a run that are not counted: the pipeline fills, memory is touched first"""
LADDER = (16, 24, 32, 48, 64, 96)
"""sequences decoded at once that are tried"""
TASK: dict[str, Any] = {
    "name": "reverse",
    "args": {"length": 32, "partial_reward": True},
}
"""one turn; half of an episode's 66 tokens are sampled"""
WARMUP = WarmupOptions(target=2.0, max_steps=50, batch=32, learning_rate=3e-3, check_every=1000, seed=0)
"""just enough to write answers of about the right length"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Means of one run, seconds a step."""

    step: float
    generating: float
    training: float
    waiting: float
    """the trainer for its batch"""

    @property
    def longer(self) -> float:
        return max(self.generating, self.training)


def make_model(folder: Path) -> None:
    """A model that answers at length, if not rightly."""
    task = make_task(TASK["name"], TASK["args"])
    create_model_folder(folder, alphabet=task.alphabet)  # type: ignore[attr-defined]
    model = load_model(folder)
    assert isinstance(model, Decoder)
    warm_up(model, task, Tokenizer(folder), WARMUP, lambda _: 0.0)
    save_folder(folder, model, source=folder)


def make_settings(
    model: Path, *, max_staleness: int, pipeline_depth: float, max_sequences: int, steps: int, pinned: bool
) -> Settings:
    values = {
        "name": "overlap",
        "pin_threads": pinned,
        "model": {"path": str(model)},
        "task": TASK,
        "recipe": {"name": "grpo"},
        "batch": {"groups_per_step": 16, "group_size": 8},
        "staleness": {"max_staleness": max_staleness, "pipeline_depth": pipeline_depth, "window": 0.0},
        "generator": {"max_sequences": max_sequences},
        "trainer": {"steps": steps},
        "optimizer": {"learning_rate": 1e-7, "warmup_steps": 0},
        "evaluation": {"every": 0, "problems": 8, "samples": 1},
        "checkpoint": {"every": 0},
    }
    settings = structured(Settings, values, where="")
    check(settings)
    return settings


def seconds_of_one_side(settings: Settings) -> tuple[float, float]:
    """(generating, training) seconds of a batch, each alone in this process; the second of two batches."""

    async def batches() -> tuple[float, float]:
        tokenizer = Tokenizer(settings.model.path)
        task = make_task(settings.task.name, settings.task.args)
        order = PromptOrder(len(task.problems("train")), settings.seed)
        engine = make_engine(settings, tokenizer)
        learner = make_learner(settings)
        for step in range(2):
            started = time.process_time()  # one thread: what it would take on a core of its own
            episodes = await sample_episodes(engine, task, tokenizer, tickets_of(settings, order, step), Limits())
            generated = time.process_time()
            learner.step(pack_step(settings, episodes, needs=learner.needs))
            generating, training = generated - started, time.process_time() - generated
        await engine.close()
        return generating, training

    return asyncio.run(batches())


def balanced(settings: Settings) -> tuple[int, dict[str, float]]:
    """Sequences at once for which both sides take about as long, and what was measured for it."""
    found: dict[int, tuple[float, float]] = {}
    for sequences in LADDER:
        chosen = replace(settings, generator=replace(settings.generator, max_sequences=sequences))
        found[sequences] = seconds_of_one_side(chosen)
    best = min(found, key=lambda n: abs(found[n][0] - found[n][1]))
    generating, training = found[best]
    return best, {"generating_alone_s": round(generating, 4), "training_alone_s": round(training, 4)}


def measure(settings: Settings, folder: Path) -> Measured:
    """Run the processes; means over the steps that count."""
    run_training(settings, folder, console=Console(quiet=True))
    rows = list(read_rows(RunFolder(folder).metrics))
    counted = rows[SKIPPED:]
    spans = [after["time"] - before["time"] for before, after in zip(rows[SKIPPED - 1 :], counted, strict=False)]
    busy = counted[-1]["time/generator_busy"] - rows[SKIPPED - 1]["time/generator_busy"]
    return Measured(
        step=statistics.fmean(spans),
        generating=busy / len(counted),
        training=statistics.fmean([row["time/step"] for row in counted]),
        waiting=statistics.fmean([row["time/wait_for_batch"] for row in counted]),
    )


def compared(model: Path, sequences: int, steps: int, folder: Path, *, pinned: bool) -> dict[str, Any]:
    """One asynchronous and one synchronous run, and their ratios."""
    ways = {"asynchronous": (2, 3.0), "synchronous": (0, 1.0)}
    runs = {
        name: measure(
            make_settings(
                model,
                max_staleness=staleness,
                pipeline_depth=depth,
                max_sequences=sequences,
                steps=steps,
                pinned=pinned,
            ),
            folder / name,
        )
        for name, (staleness, depth) in ways.items()
    }
    both, alone = runs["asynchronous"], runs["synchronous"]
    return {
        "step_over_longer_side": round(both.step / both.longer, 3),
        "faster_than_synchronous": round(alone.step / both.step, 3),
        "shorter_over_longer_side": round(min(both.generating, both.training) / both.longer, 3),
        **{f"{name}_s_a_step": {k: round(v, 4) for k, v in asdict(m).items()} for name, m in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pinned", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        make_model(model)
        base = make_settings(model, max_staleness=0, pipeline_depth=1.0, max_sequences=64, steps=2, pinned=False)
        sequences, alone = balanced(base)
        with redirect_stdout(sys.stderr):  # what the runs show
            rounds = [
                compared(model, sequences, arguments.steps, folder / str(number), pinned=arguments.pinned)
                for number in range(arguments.rounds)
            ]
    rounds.sort(key=lambda r: r["step_over_longer_side"])
    middle = rounds[len(rounds) // 2]
    result = {
        **middle,
        "target_step_over_longer_side": 1.1,
        "target_faster_than_synchronous": 1.6,
        "all_step_over_longer_side": [r["step_over_longer_side"] for r in rounds],
        "all_faster_than_synchronous": [r["faster_than_synchronous"] for r in rounds],
        "chosen": {"generator.max_sequences": sequences, **alone},
        "batch": [base.batch.groups_per_step, base.batch.group_size],
        "steps_counted": arguments.steps - SKIPPED,
        "pinned": arguments.pinned,
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
    }
    print(json.dumps(result))


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
