"""HOW IT CROSSES PROCESSES. In: a message. Out: the same message in another process, or `WireError`.

The buffer owns a `Router`; trainer and launcher a `Dealer`; generators an `AsyncDealer`.
Invariant: nothing executable on the wire, and a bad message never ends the process that receives it.
Who blocks whom: the router blocks nobody (it never waits for a peer to read); a dealer's receive
blocks its caller until a deadline with a name, then raises `WireTimeout`. Sending never blocks: how
much can be under way is bounded by permits, not by the sockets' high-water marks.
"""

from async_rl.trajectory.codec import WireError
from async_rl.wire.channel import AsyncDealer, Dealer, Router, WireTimeout

__all__ = ["AsyncDealer", "Dealer", "Router", "WireError", "WireTimeout"]
