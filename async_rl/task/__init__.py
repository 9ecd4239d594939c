"""Tasks: where problems, episodes and rewards come from.

In: a task's name (built-in, `module:Class` or `file.py:Class`) and settings, and for `dataset` the user's file.
Out: problems by index, and episodes: `await task.rollout(problem, session)` runs one and returns its reward.
Invariant: the same settings give the same problems, splits and environment in every process. The order of prompts is a
function of the position alone, so nothing here needs saving.
Who waits: a rollout waits for the engine behind `session.generate`, and for its reward if that is a coroutine (`math`
runs in a child process with a deadline). Only the generator that runs a task waits for it.
Nothing here imports torch.
"""

from async_rl.task.build import has_demonstrations, make_task, task_class
from async_rl.task.protocol import Problem, Session, Task

__all__ = ["Problem", "Session", "Task", "has_demonstrations", "make_task", "task_class"]
