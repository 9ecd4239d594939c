"""What a turn of an episode is to be like (`TurnRequest`)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class TurnRequest(Struct, frozen=True, kw_only=True, gc=False):
    """What a turn is to be like; see `task.Session.generate`."""

    max_tokens: int
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    temperature: float | None = None
    state_key: int = -1
    agent: str = ""
