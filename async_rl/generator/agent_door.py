"""Where agents reach the episodes of a process (`AgentDoor`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from async_rl.task.protocol import Connection

if TYPE_CHECKING:
    from async_rl.generator.session import EpisodeSession


class AgentDoor(Protocol):
    """Where agents reach the episodes of a process; implemented by `endpoint.Endpoint`."""

    def open(self, session: EpisodeSession) -> Connection:
        """Let agents play an episode. Raises UserError when that cannot be."""
        ...

    def close(self, connection: Connection) -> None:
        """The episode is over: its key is valid no longer."""
        ...
