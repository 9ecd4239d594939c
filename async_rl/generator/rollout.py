"""One episode of a task, run to the trajectory that it becomes, whatever the task does."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Any

from async_rl.errors import RunFailed
from async_rl.generator.engine import LogitsNotFinite
from async_rl.generator.session import EpisodeAborted, EpisodeSession, Ticket, TurnLimit
from async_rl.generator.task_code import TaskGuard, TaskOverrun, describe_error, is_ours, waits_in
from async_rl.task.protocol import Task
from async_rl.trajectory import Trajectory


async def run_episode(
    task: Task, session: EpisodeSession, ticket: Ticket, *, timeout_s: float, guard: TaskGuard | None = None
) -> Trajectory:
    """Run one episode of the task.

    Whatever the task or its reward raises, a cancellation included, ends this trajectory, with the reason; so does one
    that does not come back in time. It runs in an asyncio task of its own, so that a cancellation of this one is the
    caller's. Raises RunFailed when the engine died, and what a person or the launcher orders.
    """
    guard = guard or TaskGuard()
    rollout = _rollout(task, session, ticket)
    playing = asyncio.create_task(_outcome(guard, rollout))
    playing.add_done_callback(lambda _: rollout.close())  # it may have been cancelled before it began
    deadline, late = time.monotonic() + timeout_s, ""
    try:
        while not playing.done() and not late:
            left = deadline - time.monotonic()
            if guard.limit_s:
                left = min(left, guard.limit_s - session.task_s)
            await asyncio.wait({playing}, timeout=max(0.0, left))
            if not playing.done():
                late = _lateness(session, rollout, deadline, timeout_s, guard)
    finally:
        if not playing.done():
            playing.cancel()
            playing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    outcome: float | BaseException
    if late:
        outcome = TaskOverrun(late)
    elif playing.cancelled():  # by the task, before it began
        outcome = asyncio.CancelledError()
    else:
        outcome = playing.result()
    if session.engine_error is not None:
        outcome = session.engine_error
    match outcome:
        case float():
            if not math.isfinite(outcome):
                return session.finish(reward=0.0, failed="error", reason=f"the reward is {outcome}")
            return session.finish(reward=outcome)
        case RunFailed():
            raise outcome
        case TurnLimit():
            return session.finish(reward=0.0, failed="turn_limit")
        case EpisodeAborted():
            return session.finish(reward=0.0, failed="aborted", reason=str(outcome))
        case TaskOverrun() | LogitsNotFinite():
            return session.finish(reward=0.0, failed="error", reason=str(outcome))
    return session.finish(reward=0.0, failed="error", reason=describe_error(outcome))


async def _rollout(task: Task, session: EpisodeSession, ticket: Ticket) -> float:
    problem = task.problems(ticket.permit.split)[ticket.permit.problem]
    session.begin(problem)
    return float(await task.rollout(problem, session))


async def _outcome(guard: TaskGuard, rollout: Coroutine[Any, Any, float]) -> float | BaseException:
    """The reward, or what was raised instead: asyncio would let a SystemExit end the whole event loop."""
    try:
        return await guard.steps(rollout)
    except BaseException as error:
        if is_ours(error):
            raise
        return error


def _lateness(session: EpisodeSession, rollout: object, deadline: float, timeout_s: float, guard: TaskGuard) -> str:
    """Why the episode is to end now; empty: it may go on."""
    if time.monotonic() >= deadline:
        return f"the episode took more than {timeout_s:g} s"
    if guard.limit_s and session.task_s >= guard.limit_s:
        place = waits_in(rollout)
        where = f" in {place}" if place else ""
        return f"the task or its reward took more than {guard.limit_s:g} s (generator.task_timeout_s){where}"
    return ""
