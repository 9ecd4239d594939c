"""A task whose code does what no code should, when chaos orders it (`Sabotaged`).

An order is a file of a folder; whichever episode comes first takes it away and carries it out. So each is carried out
once, in whichever process, and one that is still there was not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config.schema import setting
from async_rl.task import make_task
from async_rl.task.protocol import Problem, Reward, Session, Task
from async_rl.trajectory import Split

NAME = "async_rl.instruments.chaos.sabotage:Sabotaged"
POISONED = "poisoned"
"""first word of the file that names a poisoned problem"""


class Sabotage(BaseException):
    """What a reward raises that is no Exception."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SabotageSettings:
    name: str = setting("", "the task")
    args: dict[str, Any] = setting({}, "its settings")
    orders: str = setting("", "folder of the orders")


class Sabotaged(Task):
    """The task of its settings, but for orders."""

    Settings = SabotageSettings

    def __new__(cls, settings: SabotageSettings) -> Any:
        """The task itself, of a class that differs in its rollout alone."""
        task = make_task(settings.name, settings.args)
        kind: Any = type(task)
        orders = Path(settings.orders)

        async def rollout(self: Task, problem: Problem, session: Session) -> Reward:
            mark = orders / f"{POISONED}-{session.split}-{problem.index}"
            if mark.exists() or _taken(orders, "poison", mark):
                os.kill(os.getpid(), signal.SIGSEGV)
            reward: Reward = await kind.rollout(self, problem, session)
            if _taken(orders, "raise"):
                raise Sabotage("ordered by chaos")
            if _taken(orders, "cancel") and (running := asyncio.current_task()) is not None:
                running.cancel()  # and goes on: whoever awaits next is cancelled
            return reward

        task.__class__ = type(kind.__name__, (kind,), {"rollout": rollout})
        return task

    def problems(self, split: Split) -> Sequence[Problem]:
        raise AssertionError("this class has no instances")

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        raise AssertionError("this class has no instances")


def _taken(orders: Path, kind: str, becomes: Path | None = None) -> bool:
    """Whether there was an order of this kind; it is gone now, or has become that file."""
    for order in orders.glob(f"{kind}-*"):
        with suppress(FileNotFoundError):  # another episode took it
            if becomes is None:
                order.unlink()
            else:
                order.rename(becomes)
            return True
    return False
