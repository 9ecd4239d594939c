"""The value of each problem of a data set under the first model, as a column of the data set (first stage of A*-PO).

V* = beta log mean exp(R / beta) over the rewards of a few answers: what the best policy at a KL price of beta earns
(arXiv 2505.20686). The task notes the column (task.args.note_fields), and recipe a_star_po learns from one answer a
problem then.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.generator.build import make_engine
from async_rl.generator.session import make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import limits_of, sample_episodes
from async_rl.run_folder import replace_text
from async_rl.task import Task, make_task
from async_rl.task.table import Problems
from async_rl.trajectory import Trajectory
from async_rl.trajectory.types import group_seed
from async_rl.wire.messages import Permit


def value(rewards: Sequence[float], beta: float) -> float:
    """beta log mean exp(R / beta) of at least one reward; beta > 0."""
    most = max(rewards)
    return most + beta * math.log(math.fsum(math.exp((reward - most) / beta) for reward in rewards) / len(rewards))


def first_values(
    settings: Settings, *, samples: int, beta: float, on_progress: Callable[[int, int], None] = lambda *_: None
) -> list[float | None]:
    """V* of every training problem under the model of `model.path`, from `samples` answers each; None where all of
    them failed. `on_progress`: called with problems done and problems in all."""
    task, tokenizer = make_task(settings.task.name, settings.task.args), Tokenizer.of(settings.model)
    limits, number = limits_of(settings), len(task.problems("train"))
    at_once = max(1, settings.generator.max_sequences // samples)

    async def run() -> list[float | None]:
        engine = make_engine(settings, tokenizer)
        found: list[float | None] = []
        try:
            for first in range(0, number, at_once):
                chosen = range(first, min(number, first + at_once))
                tickets = [t for index in chosen for t in make_tickets(_permit(settings, index, samples))]
                episodes = await sample_episodes(engine, task, tokenizer, tickets, limits)
                found += [_value_of(episodes, index, beta) for index in chosen]
                on_progress(len(found), number)
        finally:
            await engine.close()
        return found

    return asyncio.run(run())


def write_values(settings: Settings, values: Sequence[float | None], path: Path, column: str) -> None:
    """Write the data set of the settings' task to `path` as JSON lines, the training rows with their value in `column`.
    Raises UserError for a task without rows."""
    task = make_task(settings.task.name, settings.task.args)
    lines = []
    for problems, of_each in ((_rows_of(task, "train"), values), (_rows_of(task, "eval"), None)):
        for index in range(len(problems)):
            row = dict(problems.row(index))
            if of_each is not None:
                row[column] = of_each[index]
            lines.append(json.dumps(row, ensure_ascii=False, default=str))
    replace_text(path, "\n".join(lines) + "\n")


def check_rows(settings: Settings) -> None:
    """Raises UserError for a task without rows."""
    _rows_of(make_task(settings.task.name, settings.task.args), "train")


def _rows_of(task: Task, split: str) -> Problems:
    problems = task.problems("train" if split == "train" else "eval")
    if not isinstance(problems, Problems):
        raise UserError(f"task '{task.name}' reads no rows that a value could be written to; it must be a data set")
    return problems


def _permit(settings: Settings, index: int, samples: int) -> Permit:
    return Permit(
        group=index, problem=index, split="train", samples=tuple(range(samples)),
        seed=group_seed(settings.seed, index), temperature=settings.generator.temperature,
    )  # fmt: skip


def _value_of(episodes: Sequence[Trajectory], index: int, beta: float) -> float | None:
    rewards = [t.reward for t in episodes if t.group == index and not t.failed]
    return value(rewards, beta) if rewards else None
