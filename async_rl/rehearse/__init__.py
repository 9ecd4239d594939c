"""A CONFIG'S SHAPES ON A LAPTOP. In: settings for GPUs. Out: settings with the same recipe, staleness bound, ranks and
kind of task that run to their end on a CPU in a minute, the small model and the data they need, and a table of what
was replaced.

Invariant: what is not in the table is as it was. `shrink` is a pure function, `plan` says what would be done, `prepare`
makes the files. Nobody waits.
"""

from async_rl.rehearse.prepare import Rehearsal, plan, prepare

__all__ = ["Rehearsal", "plan", "prepare"]
