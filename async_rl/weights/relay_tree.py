"""Who fetches weights from whom, where relays pass them on: a tree whose root is the weight server.

The server keeps it; a relay says again and again that it is there, and is told its parent. A relay that is not heard
of, or of which a child says that it is silent, leaves the tree, and the youngest takes its place: it has no children,
so that nobody else moves. Pure: the clock is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GONE_S = 20.0
"""a relay that was not heard of for so long has left"""


@dataclass(slots=True)
class RelayTree:
    """Says for each relay whom it fetches from: the first `fan_out` relays fetch from the server, each further
    one from a relay that came before it.

    With `fan_out` 1 the relays are a chain. Every machine receives a version once and sends it once, and all do so at
    the same time: the last one has it after the time of one copy and of one more chunk for each link.
    """

    fan_out: int = 1
    """readers that one machine sends to, the server's included"""
    places: list[str] = field(default_factory=list)
    """endpoints"""
    heard_at: dict[str, float] = field(default_factory=dict)

    def parent_of(self, endpoint: str, now: float, lost: str = "") -> str:
        """The endpoint that this relay fetches from; empty: the server. It is in the tree from now on. `lost`: a parent
        that does not answer it any more."""
        self.tick(now)
        if lost and lost != endpoint:
            self._remove(lost)
        if endpoint not in self.heard_at:
            self.places.append(endpoint)
        self.heard_at[endpoint] = now
        above = self.places.index(endpoint) // self.fan_out - 1
        return self.places[above] if above >= 0 else ""

    def tick(self, now: float) -> None:
        """Forget relays that have left."""
        for endpoint in [one for one, heard_at in self.heard_at.items() if now - heard_at > GONE_S]:
            self._remove(endpoint)

    def _remove(self, endpoint: str) -> None:
        if self.heard_at.pop(endpoint, None) is None:
            return
        place = self.places.index(endpoint)
        youngest = self.places.pop()
        if youngest != endpoint:
            self.places[place] = youngest
