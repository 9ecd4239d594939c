"""Environments of other packages as tasks: each adapter speaks its package's own interface and scores as it does.

In: the settings of an adapter (`task.args`), and the package itself, which is imported only when the task is made.
Out: a `Task` as any other: problems by index, the same in every process, and episodes.
Invariant: both splits are disjoint, and what an episode does follows from its problem and its seed alone, as far as the
package lets it. A package that is not installed is named, with the command that installs it.
Who waits: an episode waits for its environment, in a thread or a process of its own where that may take long.
"""

from async_rl.task.adapters.registry import ADAPTERS, Adapter, adapter_class

__all__ = ["ADAPTERS", "Adapter", "adapter_class"]
