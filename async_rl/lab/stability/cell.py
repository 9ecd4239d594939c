"""One cell in this process: train, watch, draw the curves."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from async_rl.lab.evaluate import evaluate, limits_of
from async_rl.lab.stability.exact_lag import FirstBatches, Sampled, train_with_exact_lag
from async_rl.lab.stability.record import STEP_CURVES, Curves, summarise
from async_rl.model.folder import load_model
from async_rl.model.tokenizer import Tokenizer
from async_rl.settings import Settings
from async_rl.task import make_task
from async_rl.trainer.learner import StepReport

FIRST_PROBLEMS, FIRST_SAMPLES = 256, 2
"""held-out episodes on which an initial model is measured"""
BEYOND = 16
"""how many of the versions that sample nothing that is trained are measured before the last tenth"""


@dataclass(slots=True)
class Watch:
    """Gathers the curves of a cell."""

    rewards: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """by version: mean reward of each batch it sampled"""
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
    """Of the versions whose batches come too late to be trained: the last tenth of all, and some before."""
    last = range(steps - math.ceil(steps / 10), steps)
    before = range(max(1, steps - lag), last.start)
    stride = max(1, len(before) // BEYOND)
    return [*before[::stride], *last]


def run_cell(
    settings: Settings,
    *,
    reward_first: float,
    each_step: Callable[[int], None] = lambda _: None,
    first: FirstBatches | None = None,
) -> tuple[dict[str, Any], Curves]:
    """Train; the numbers of the record, and the curves. `first`: see FirstBatches. Raises RunFailed or UserError."""
    wall, processor = time.monotonic(), time.process_time()
    torch.manual_seed(settings.seed)
    watch = Watch()

    def step(number: int, report: StepReport) -> None:
        watch.step(report)
        each_step(number + 1)

    steps = settings.trainer.steps
    train_with_exact_lag(
        settings,
        each_batch=watch.batch,
        each_step=step,
        measured=versions_to_measure(steps, settings.staleness.max_staleness),
        first=first,
    )
    curves = watch.curves()
    numbers = summarise(curves, steps=steps, reward_first=reward_first)
    return {
        **numbers,
        "steps_skipped": watch.skipped,
        "seconds": time.monotonic() - wall,
        "processor_seconds": time.process_time() - processor,
    }, curves


def measure_first(settings: Settings) -> float:
    """Reward of the initial model on held-out problems, sampled as training samples."""
    episodes = evaluate(
        load_model(Path(settings.model.path)),
        make_task(settings.task.name, settings.task.args),
        Tokenizer(Path(settings.model.path)),
        problems=FIRST_PROBLEMS,
        samples=FIRST_SAMPLES,
        temperature=settings.generator.temperature,
        seed=settings.seed,
        limits=limits_of(settings),
        max_context=settings.generator.max_context or None,
    )
    return sum(t.reward for t in episodes if not t.failed) / len(episodes)
