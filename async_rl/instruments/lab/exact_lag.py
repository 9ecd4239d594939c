"""Trains with an exact lag k: the batch of step s was sampled by version max(0, s - k).

`instruments/synchronous.py` is the case k = 0. The weights of the last k + 1 versions are kept, so k is limited by
memory alone. As in a run, problems are asked in `PromptOrder` and every trajectory has its own seed, so cells of one
seed see the same problems whatever their lag.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field

from torch import Tensor

from async_rl.config import Settings
from async_rl.generator.build import make_engine
from async_rl.generator.engine import Engine
from async_rl.instruments.synchronous import tickets_of
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import limits_of, sample_episodes
from async_rl.task import make_task
from async_rl.task.order import PromptOrder
from async_rl.trainer.build import make_learner
from async_rl.trainer.learner import Learner, StepReport
from async_rl.trainer.packing import pack_step
from async_rl.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The episodes of one batch."""

    step: int
    """the step whose problems these are"""
    version: int
    """the version that sampled them"""
    episodes: list[Trajectory]
    trained: bool
    """False: sampled behind the last step, to measure a version that no batch was to come from"""


def sampling_version(step: int, lag: int) -> int:
    """Version that samples the batch of `step`."""
    return max(0, step - lag)


@dataclass(slots=True)
class WeightHistory:
    """Copies of the weights of the newest versions."""

    keep: int
    """versions"""
    _weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, version: int, weights: dict[str, Tensor]) -> None:
        self._weights[version] = {name: tensor.clone() for name, tensor in weights.items()}
        self._weights.pop(version - self.keep, None)

    def __getitem__(self, version: int) -> dict[str, Tensor]:
        return self._weights[version]


@dataclass(slots=True)
class FirstBatches:
    """The batches that version 0 sampled, kept from one training to the next in a process.

    They depend on model, task, seed and engine alone, not on recipe, learning rate or lag: at lag k the first k + 1
    batches of all cells of one replicate are the same trajectories. They are kept for one replicate at a time.
    """

    _of: str = ""
    _batches: dict[tuple[int, int], list[list[Trajectory]]] = field(default_factory=dict)
    """by first and last step sampled together, so that a cell's numbers do not depend on those before it"""

    def of(self, settings: Settings) -> dict[tuple[int, int], list[list[Trajectory]]]:
        """The batches known for these settings, to be added to."""
        parts = (settings.model, settings.task, settings.generator, settings.batch)
        key = json.dumps([settings.seed, *(asdict(part) for part in parts)], sort_keys=True)
        if key != self._of:
            self._of, self._batches = key, {}
        return self._batches


def train_with_exact_lag(
    settings: Settings,
    *,
    each_batch: Callable[[Sampled], None],
    each_step: Callable[[int, StepReport], None],
    measured: Collection[int] = (),
    first: FirstBatches | None = None,
) -> Learner:
    """All steps of `settings` at lag `staleness.max_staleness`; the learner afterwards.

    `each_batch` sees every batch in the order of sampling, `each_step` every step. Versions too new to sample
    a batch that is trained sample the one that would be their turn if they are in `measured`. `first`: batches of
    version 0 that trainings before this one sampled. Raises RunFailed for a batch without a usable trajectory.
    """

    async def run() -> Learner:
        tokenizer = Tokenizer.of(settings.model)
        sampler = _Sampler(settings, make_engine(settings, tokenizer), tokenizer, first or FirstBatches())
        lag, steps = settings.staleness.max_staleness, settings.trainer.steps
        learner = make_learner(settings)
        history = WeightHistory(lag + 1)
        try:
            for step in range(steps):
                version = sampling_version(step, lag)
                if version > 0:
                    await sampler.engine.load(history[version], version)
                batch = await sampler.batch(step, version)
                each_batch(batch)
                each_step(step, learner.step(pack_step(settings, batch.episodes)))
                history.add(learner.version, learner.weights())
            for version in sorted(v for v in measured if steps - lag <= v < steps and v > 0):
                await sampler.engine.load(history[version], version)
                each_batch(await sampler.batch(version + lag, version))
        finally:
            await sampler.engine.close()
        return learner

    return asyncio.run(run())


class _Sampler:
    """Samples batches by step; those of version 0 several at a time, as many as the engine takes."""

    def __init__(self, settings: Settings, engine: Engine, tokenizer: Tokenizer, first: FirstBatches) -> None:
        self.engine = engine
        self._first = first.of(settings)
        self._settings = settings
        self._tokenizer = tokenizer
        self._task = make_task(settings.task.name, settings.task.args)
        self._order = PromptOrder(len(self._task.problems("train")), settings.seed)
        self._limits = limits_of(settings)
        size = settings.batch.groups_per_step * settings.batch.group_size
        self._ahead = max(1, settings.generator.max_sequences // size)
        self._ready: dict[int, list[Trajectory]] = {}

    async def batch(self, step: int, version: int) -> Sampled:
        assert self.engine.version == version
        if step not in self._ready:
            await self._sample(step, version)
        steps = self._settings.trainer.steps
        return Sampled(step=step, version=version, episodes=self._ready.pop(step), trained=step < steps)

    async def _sample(self, step: int, version: int) -> None:
        last = step
        if version == 0:
            newest = min(self._settings.staleness.max_staleness, self._settings.trainer.steps - 1)
            last = min(newest, step + self._ahead - 1)
        batches = self._first.get((step, last)) if version == 0 else None
        if batches is None:
            batches = await self._sampled(step, last)
            if version == 0:
                self._first[step, last] = batches
        self._ready.update(zip(range(step, last + 1), batches, strict=True))

    async def _sampled(self, first: int, last: int) -> list[list[Trajectory]]:
        """The batches of steps first .. last, under the weights that the engine has."""
        tickets = [t for s in range(first, last + 1) for t in tickets_of(self._settings, self._order, s)]
        episodes = await sample_episodes(self.engine, self._task, self._tokenizer, tickets, self._limits)
        size = len(episodes) // (last + 1 - first)
        return [episodes[begin : begin + size] for begin in range(0, len(episodes), size)]
