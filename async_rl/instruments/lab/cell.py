"""One cell of a lab: a training with an exact lag, its curves and its numbers."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from async_rl.config import Settings
from async_rl.instruments.lab.exact_lag import FirstBatches, Sampled, train_with_exact_lag
from async_rl.instruments.lab.record import STEP_CURVES, Curves, summarise
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import evaluate, limits_of
from async_rl.run.fitting import fitted
from async_rl.task import make_task
from async_rl.trainer.learner import StepReport

FIRST_PROBLEMS, FIRST_SAMPLES = 256, 2
"""held-out episodes on which an initial model is measured"""
BEYOND = 16
"""how many of the versions that sample nothing that is trained are measured before the last tenth"""


def run_cell(
    settings: Settings,
    *,
    reward_first: float,
    each_step: Callable[[int], None] = lambda _: None,
    first: FirstBatches | None = None,
) -> tuple[dict[str, Any], Curves]:
    """Train one cell in this process; the numbers of its record, and its curves. `first`: see FirstBatches.

    Raises RunFailed or UserError."""
    wall, processor = time.monotonic(), time.process_time()
    settings = fitted(settings)
    torch.manual_seed(settings.seed)
    recorder = CurveRecorder()

    def step(number: int, report: StepReport) -> None:
        recorder.step(report)
        each_step(number + 1)

    steps = settings.trainer.steps
    train_with_exact_lag(
        settings,
        each_batch=recorder.batch,
        each_step=step,
        measured=versions_to_measure(steps, settings.staleness.max_staleness),
        first=first,
    )
    curves = recorder.curves()
    numbers = summarise(curves, steps=steps, reward_first=reward_first)
    return {
        **numbers,
        "steps_skipped": recorder.skipped,
        "seconds": time.monotonic() - wall,
        "processor_seconds": time.process_time() - processor,
    }, curves


def measure_first(settings: Settings) -> float:
    """Reward of the initial model on held-out problems, sampled as training samples."""
    settings = fitted(settings)
    episodes = evaluate(
        load_model(Path(settings.model.path)),
        make_task(settings.task.name, settings.task.args),
        Tokenizer.of(settings.model),
        problems=FIRST_PROBLEMS,
        samples=FIRST_SAMPLES,
        choice="first",
        temperature=settings.generator.temperature,
        seed=settings.seed,
        limits=limits_of(settings),
        max_context=settings.generator.max_context or None,
    )
    return sum(t.reward for t in episodes if not t.failed) / len(episodes)


@dataclass(slots=True)
class CurveRecorder:
    """Gathers the curves of a cell while it is trained."""

    rewards: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """version -> mean rewards of the batches that it sampled"""
    steps: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in STEP_CURVES})
    skipped: int = 0

    def batch(self, sampled: Sampled) -> None:
        rewards = [t.reward for t in sampled.episodes if not t.failed]
        if rewards:
            self.rewards[sampled.version].append(sum(rewards) / len(rewards))

    def step(self, report: StepReport) -> None:
        metrics = report.metrics
        self.skipped += bool(report.skipped)
        for name, key in STEP_CURVES.items():
            self.steps[name].append(metrics.get(key) if key else _factor(report))

    def curves(self) -> Curves:
        versions = sorted(self.rewards)
        means = [sum(self.rewards[v]) / len(self.rewards[v]) for v in versions]
        return Curves(versions=versions, rewards=means, steps=self.steps)


def _factor(report: StepReport) -> float | None:
    """What recipe and batch made of the step's learning rate."""
    base = report.metrics.get("lr/base")
    return report.metrics["lr/effective"] / base if base else None


def versions_to_measure(steps: int, lag: int) -> list[int]:
    """Which of the versions whose batches come too late to be trained are measured: the last tenth of all versions, and
    some before."""
    last = range(steps - math.ceil(steps / 10), steps)
    before = range(max(1, steps - lag), last.start)
    stride = max(1, len(before) // BEYOND)
    return [*before[::stride], *last]
