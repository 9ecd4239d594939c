"""How the buffer's memory budget is divided. What does not fit is in the store alone.

Everything else the process keeps is small and bounded: a record of some 100 bytes for each trajectory of the
groups that hold a slot, the results of a few evaluations, counters by reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from async_rl.wire.channel import UNREAD_IN
from async_rl.wire.frames import PORTION_BYTES

FEWEST_MESSAGES = 16
"""of a peer that may wait in the process: fewer would stop senders without need"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Example: `divide(256 << 20, peers=2)`."""

    cache_bytes: int
    """pages of the store"""
    handled_bytes: int
    """trajectories received and not yet committed"""
    queued_messages: int
    """of each peer, received by the socket's thread and not yet looked at; generators send at most
    PORTION_BYTES in one, or a single trajectory. Beyond it the sender keeps them"""
    part_bytes: int
    """of a batch that is being sent; three copies of it exist for a moment (stored, framed, on its way)"""


def divide(budget_bytes: int, *, peers: int) -> Memory:
    """A quarter for pages, an eighth each for what is handled and queued, three for a batch under way."""
    eighth = budget_bytes // 8
    return Memory(
        cache_bytes=2 * eighth,
        handled_bytes=eighth,
        queued_messages=min(UNREAD_IN, max(FEWEST_MESSAGES, eighth // PORTION_BYTES // max(1, peers))),
        part_bytes=eighth,
    )
