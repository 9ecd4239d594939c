"""One episode of a task, run to the trajectory that it becomes, whatever the task does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from async_rl.errors import RunFailed
from async_rl.generator.engine import LogitsNotFinite
from async_rl.generator.session import EpisodeAborted, EpisodeSession, Ticket, TurnLimit
from async_rl.generator.task_code import Steps, TaskGuard, TaskOverrun, describe_error, is_ours, reason_of, waits_in
from async_rl.generator.task_wire import FarError
from async_rl.task.protocol import Problem, Task
from async_rl.task.weigh import ROLLOUT, Weighed, Weights, has_group_reward
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import PREFIX

Result = TypeVar("Result")
BLOCKS = "no agent asked for a turn (one with a blocking client goes into a thread: asyncio.to_thread)"
LOOK_S = 1.0
"""between two checks of a running episode"""
Late = Callable[[], tuple[float, str]]
"""says (seconds until it is to be asked again, why the work is to end now; empty: it may go on)"""


async def run_episode(
    task: Task,
    session: EpisodeSession,
    ticket: Ticket,
    *,
    timeout_s: float,
    guard: TaskGuard | None = None,
    weights: Weights | None = None,
) -> Trajectory:
    """Run one episode of the task. `weights`: of the named parts of its reward.

    Whatever the task or its reward raises, a cancellation included, ends this trajectory, with the reason; so does one
    that does not come back in time. It runs in an asyncio task of its own, so that a cancellation of this one is the
    caller's. Raises RunFailed when the engine died, and what a person or the launcher orders.
    """
    guard, weights = guard or TaskGuard(), weights or Weights()
    made, _ = await play_episode(task, session, ticket, timeout_s=timeout_s, guard=guard, weights=weights)
    return made


async def play_episode(
    task: Task, session: EpisodeSession, ticket: Ticket, *, timeout_s: float, guard: TaskGuard, weights: Weights
) -> tuple[Trajectory, Weighed]:
    """`run_episode`, and the reward that `Task.rollout` gave (0 where the episode failed), to which that of the group
    is added."""
    rollout = _rollout(task, session, ticket, weights)
    deadline = time.monotonic() + timeout_s

    def late() -> tuple[float, str]:
        # an agent that plays through the endpoint may not come back from an engine that died
        left = min(deadline - time.monotonic(), LOOK_S)
        if guard.limit_s:
            left = min(left, guard.limit_s - _task_s(session, guard))
        return left, _lateness(session, rollout, deadline, timeout_s, guard)

    try:
        outcome = await outcome_of(guard, rollout, late)
    finally:  # also when this generator gives the episode up
        own = getattr(type(task), "teardown_episode", Task.teardown_episode) is not Task.teardown_episode
        if own and session.problem is not None:  # it was begun
            await _tear_down(task, session.problem, session, guard, timeout_s)
    if session.engine_error is not None:
        outcome = session.engine_error
    elif session.cut and not session.abandoned:  # whatever the task made of that
        return session.finish(reward=0.0, failed="window"), Weighed(total=0.0, nothing=True)
    if isinstance(outcome, Weighed):
        for name, value in outcome.parts.items():
            session.note(f"{PREFIX}{name}", value)
        return session.finish(reward=outcome.total), outcome
    return _ended(session, outcome), Weighed(total=0.0, nothing=True)


async def _tear_down(task: Task, problem: Problem, session: EpisodeSession, guard: TaskGuard, timeout_s: float) -> None:
    """Call `Task.teardown_episode`."""
    limit = guard.limit_s or timeout_s
    late = late_after(limit, lambda: f"it took more than {limit:g} s")
    outcome = await outcome_of(guard, task.teardown_episode(problem, session), late)
    if isinstance(outcome, BaseException):
        session.note("teardown_error", reason_of(outcome))


def _ended(session: EpisodeSession, raised: BaseException) -> Trajectory:
    """The trajectory of an episode that did not come to a reward."""
    match raised:
        case RunFailed():
            raise raised
        case TurnLimit():
            return session.finish(reward=0.0, failed="turn_limit")
        case EpisodeAborted():
            return session.finish(reward=0.0, failed="aborted", reason=str(raised))
        case TaskOverrun() | LogitsNotFinite() | FarError():
            return session.finish(reward=0.0, failed="error", reason=str(raised))
    if session.abandoned:  # which an agent may have told in its own words
        return session.finish(reward=0.0, failed="aborted", reason=session.abandoned)
    if session.refused:  # an agent was told that nothing is left, and raised
        return session.finish(reward=0.0, failed=session.refused)
    return session.finish(reward=0.0, failed="error", reason=describe_error(raised))


def late_after(limit_s: float, reason: Callable[[], str]) -> Late:
    """Work may go on until `limit_s` from now. `reason`: why it is to end then."""
    deadline = time.monotonic() + limit_s

    def late() -> tuple[float, str]:
        left = deadline - time.monotonic()
        return left, reason() if left <= 0 else ""

    return late


async def outcome_of(guard: TaskGuard, work: Coroutine[Any, Any, Result], late: Late) -> Result | BaseException:
    """What code of the task returns, or what it raised: TaskOverrun when `late` says that it is to end. Raises what a
    person or the launcher orders."""
    loop = asyncio.get_running_loop()
    running, woken = loop.create_task(_outcome(guard, work)), loop.create_future()

    def ended(_: object) -> None:
        work.close()  # it may have been cancelled before it began
        if not woken.done():
            woken.set_result(None)

    running.add_done_callback(ended)
    reason = ""
    try:
        while not reason:
            left, _ = late()
            guard.timer.wake(woken, max(0.0, left))
            await woken
            if running.done():
                break
            woken = loop.create_future()  # its time has come: it is waited for again
            _, reason = late()
    finally:
        guard.timer.forget(woken)
        if not running.done():
            running.cancel()
            running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    if reason:
        return TaskOverrun(reason)
    if running.cancelled():  # by the task, before it began
        return asyncio.CancelledError()
    return running.result()


async def _rollout(task: Task, session: EpisodeSession, ticket: Ticket, weights: Weights) -> Weighed:
    problem = task.problems(ticket.permit.split)[ticket.permit.problem]
    session.begin(problem)
    if hasattr(task, "setup_episode"):
        await task.setup_episode(problem, session)
    reward = await task.rollout(problem, session)
    if has_group_reward(task):  # of which the weights may name parts, too
        return weights.weigh(reward, number=ROLLOUT)
    found = weights.weigh(reward)
    weights.check(found)
    return found


async def _outcome(guard: TaskGuard, work: Coroutine[Any, Any, Result]) -> Result | BaseException:
    """What is returned, or what was raised instead: asyncio would let a SystemExit end the whole event loop."""
    try:
        return await Steps(guard, work)
    except BaseException as error:
        if is_ours(error):
            raise
        return error


def _task_s(session: EpisodeSession, guard: TaskGuard) -> float:
    """Seconds since the engine gave this episode's code the word; those do not count in which another held up all."""
    spent = session.task_s
    return spent - guard.stood_s(spent) if guard.stood else spent


def _lateness(session: EpisodeSession, rollout: object, deadline: float, timeout_s: float, guard: TaskGuard) -> str:
    """Why the episode is to end now; empty: it may go on."""
    if session.engine_error is not None:
        return "the engine gave it up"
    if time.monotonic() >= deadline:
        return f"the episode took more than {timeout_s:g} s"
    if guard.limit_s and _task_s(session, guard) >= guard.limit_s:
        place = waits_in(rollout)
        where = f" in {place}" if place else ""
        said = f"the task or its reward took more than {guard.limit_s:g} s (generator.task_timeout_s){where}"
        return f"{said}; {BLOCKS}" if session.waits_for_agent else said
    return ""
