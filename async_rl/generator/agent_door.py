"""Where agents reach the episodes of a process (`AgentDoor`)."""

from __future__ import annotations

from typing import Protocol, TypeVar

from async_rl.task.protocol import Connection

Episode = TypeVar("Episode", contravariant=True)
"""`session.EpisodeSession`, which knows its door"""


class AgentDoor(Protocol[Episode]):
    """Where agents reach the episodes of a process; implemented by `endpoint.Endpoint`."""

    def open(self, session: Episode) -> Connection:
        """Let agents play an episode. Raises UserError when that cannot be."""
        ...

    def close(self, connection: Connection) -> None:
        """The episode is over: its key is valid no longer."""
        ...
