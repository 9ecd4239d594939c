"""Synchronous training in one process: what a run with `max_staleness=0` must equal.

No buffer, no sockets, no permits: generate P groups with the current weights, train on them, repeat.
It shares with a run what defines the result (prompt order, seeds, engine, learner) and nothing of what
makes a run asynchronous.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from async_rl.config import Settings
from async_rl.generator.build import make_engine
from async_rl.generator.session import Ticket, make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import limits_of, sample_episodes
from async_rl.task import make_task
from async_rl.task.order import PromptOrder
from async_rl.trainer.build import make_learner
from async_rl.trainer.learner import Learner, StepReport
from async_rl.trainer.packing import pack_step
from async_rl.trajectory.types import group_seed
from async_rl.wire.messages import Permit


def tickets_of(settings: Settings, order: PromptOrder, step: int) -> list[Ticket]:
    """The trajectories of a step's groups, as the buffer would issue them."""
    tickets: list[Ticket] = []
    for position in range(step * settings.batch.groups_per_step, (step + 1) * settings.batch.groups_per_step):
        tickets += make_tickets(
            Permit(
                group=position,
                problem=order(position),
                split="train",
                samples=tuple(range(settings.batch.group_size)),
                seed=group_seed(settings.seed, position),
                temperature=settings.generator.temperature,
            )
        )
    return tickets


def train_synchronously(settings: Settings, each_step: Callable[[int, StepReport], None]) -> Learner:
    """All steps of `settings`; the learner afterwards. `each_step` sees every report."""

    async def run() -> Learner:
        tokenizer = Tokenizer.of(settings.model)
        task = make_task(settings.task.name, settings.task.args)
        order = PromptOrder(len(task.problems("train")), settings.seed)
        engine = make_engine(settings, tokenizer)
        learner = make_learner(settings)
        limits = limits_of(settings)
        try:
            for step in range(settings.trainer.steps):
                episodes = await sample_episodes(engine, task, tokenizer, tickets_of(settings, order, step), limits)
                each_step(step, learner.step(pack_step(settings, episodes)))
                await engine.load(learner.weights(), learner.version)
        finally:
            await engine.close()
        return learner

    return asyncio.run(run())
