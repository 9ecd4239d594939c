"""Where work comes from.

In: a task's name and settings (and, for `dataset`, the user's file).
Out: problems by index, and episodes: `await task.rollout(problem, session)` speaks to the policy through the
session and returns the reward.
Invariant: the same settings give the same problems, splits and environment in every process; with the order
of prompts a pure function of the position, nothing here needs saving.
Who waits: a rollout waits for the engine behind `session.generate`, and for its reward if that is a coroutine
(`math` runs in a child process under a deadline). Nothing waits for a task but the generator that runs it.
This room never imports torch.
"""

from async_rl.task.build import has_demonstrations, make_task, task_class
from async_rl.task.protocol import Problem, Session, Task

__all__ = ["Problem", "Session", "Task", "has_demonstrations", "make_task", "task_class"]
