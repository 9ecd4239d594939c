"""What a process holds for all episodes of its task: what the task set up, places that they share, and the endpoint
of its agents."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from async_rl.errors import RunFailed, UserError, nearest
from async_rl.generator.endpoint import Endpoint
from async_rl.generator.places import Slots
from async_rl.generator.step_mark import MarkedThreads, StepMark
from async_rl.generator.task_code import describe_error, is_ours
from async_rl.task.protocol import Task

TEAR_DOWN_S = 5.0
"""longest time for `Task.teardown`"""
LEAST_THREADS = 32
MOST_SLOTS = 1_000_000


def slots_of(task: Task, chosen: Mapping[str, int]) -> dict[str, int]:
    """Places that the episodes of a process share. `chosen`: generator.task_slots. Raises UserError."""
    own: Mapping[str, int] = getattr(task, "slots", {})
    for name, limit in chosen.items():
        if name not in own:
            known = nearest(name, own) if own else "it has none; leave the setting out"
            raise UserError(f"generator.task_slots names '{name}', which is no slot of task '{task.name}'; {known}")
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise UserError(f"generator.task_slots.{name} is {limit!r}; it must be a whole number")
    limits = {**own, **chosen}
    for name, limit in limits.items():
        if not 1 <= limit <= MOST_SLOTS:
            raise UserError(f"there are {limit} slots '{name}'; there must be 1 to {MOST_SLOTS} (generator.task_slots)")
    return limits


@dataclass(slots=True, eq=False)
class Facilities:
    """Opened before the first episode, closed behind the last. Within one event loop.

    Args:
        threads: that code of the task may use at once (`asyncio.to_thread`), one an episode.
    """

    task: Task
    threads: int
    chosen: Mapping[str, int] = field(default_factory=dict)
    """generator.task_slots"""
    mark: StepMark | None = None
    """tells whose code the threads run"""
    slots: Slots = field(init=False)
    agents: Endpoint = field(default_factory=Endpoint)
    ready: bool = False

    def __post_init__(self) -> None:
        self.slots = Slots(slots_of(self.task, self.chosen))

    async def open(self, *, timeout_s: float) -> None:
        """Set the task up. Raises RunFailed when that fails or takes too long."""
        # asyncio's own pool has a handful of threads: so few agents would run at once
        pool = MarkedThreads(max(LEAST_THREADS, self.threads), self.mark)
        asyncio.get_running_loop().set_default_executor(pool)
        if not hasattr(self.task, "setup"):
            return
        try:
            await asyncio.wait_for(self.task.setup(), timeout_s)
        except TimeoutError as error:
            raise RunFailed(f"the task's setup took more than {timeout_s:g} s (generator.episode_timeout_s)") from error
        except Exception as error:
            raise RunFailed(f"the task's setup failed: {describe_error(error)}") from error
        self.ready = True

    async def close(self) -> str:
        """Shut the endpoint and tear the task down. Returns what went wrong; empty: nothing."""
        await self.agents.shut()
        if not self.ready:
            return ""
        self.ready = False
        try:
            await asyncio.wait_for(self.task.teardown(), TEAR_DOWN_S)
        except TimeoutError:
            return f"the task's teardown took more than {TEAR_DOWN_S:g} s"
        except BaseException as error:
            if is_ours(error) or isinstance(error, asyncio.CancelledError):
                raise
            return f"the task's teardown failed: {describe_error(error)}"
        return ""
