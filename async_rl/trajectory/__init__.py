"""WHAT FLOWS. In: nothing. Out: `Trajectory`, the record of one episode, and its byte form.

Invariant: a policy token always has its behaviour log-prob, its weight version and its turn.
Nothing here blocks; neither torch nor sockets are imported.
"""

from async_rl.trajectory.types import Ended, Split, Trajectory, Turn, VersionSpan

__all__ = ["Ended", "Split", "Trajectory", "Turn", "VersionSpan"]
