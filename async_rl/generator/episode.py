"""One episode from its problem to a trajectory, whatever the task's code does."""

from __future__ import annotations

import asyncio
import math

from async_rl.errors import RunFailed
from async_rl.generator.session import EpisodeSession, Ticket, TurnLimit
from async_rl.task.protocol import Task
from async_rl.trajectory import Trajectory


async def run_episode(task: Task, session: EpisodeSession, ticket: Ticket, *, timeout_s: float) -> Trajectory:
    """Roll the task out. Whatever the task or its reward raises ends this trajectory, with the reason.
    Raises RunFailed when the engine died."""
    try:
        problem = task.problems(ticket.split)[ticket.problem]
        session.begin(problem)
        async with asyncio.timeout(timeout_s):
            reward = float(await task.rollout(problem, session))
    except TurnLimit:
        return session.finish(reward=0.0, failed="turn_limit")
    except TimeoutError:
        return session.finish(reward=0.0, failed="error", reason=f"the episode took more than {timeout_s:g} s")
    except ConnectionAbortedError as error:
        return session.finish(reward=0.0, failed="aborted", reason=str(error))
    except RunFailed:  # the engine died
        raise
    except Exception as error:  # the task is the user's code: reported, and ends this trajectory
        return session.finish(reward=0.0, failed="error", reason=f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return session.finish(reward=0.0, failed="error", reason=f"the reward is {reward}")
    return session.finish(reward=reward)
