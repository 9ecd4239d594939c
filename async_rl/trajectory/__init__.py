"""WHAT FLOWS. In: an episode's tokens, or the bytes of one. Out: `Trajectory`, the record of one episode (`types`), and
its byte form (`codec`).

Invariant: a policy token always has its behaviour log-prob, its weight version and its turn.

Who blocks whom: nothing here blocks; neither torch nor sockets are imported.
"""

from async_rl.trajectory.types import Ended, Split, Trajectory, Turn, VersionSpan

__all__ = ["Ended", "Split", "Trajectory", "Turn", "VersionSpan"]
