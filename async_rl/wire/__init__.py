"""HOW IT CROSSES PROCESSES. In: a message. Out: the same message in another process, or `WireError`.

`messages` declares every message, `frames` turns messages into bytes and back, `channel` holds the sockets: the
buffer owns a `Router`; trainer and launcher own a `Dealer`; generators own an `AsyncDealer`. Importing the room
opens no socket and loads no socket library, so that the simulator can use the messages alone.

Invariant: nothing executable crosses the wire, and a bad message never ends the process that receives it.

Who blocks whom: the router blocks nobody (it never waits for a peer to read). A dealer's `receive` blocks its
caller until a deadline with a name, then raises `WireTimeout`. Sending never blocks: permits bound how much can
be under way, not the sockets' high-water marks.
"""

from async_rl.trajectory.codec import WireError
from async_rl.wire.frames import decode, encode
from async_rl.wire.messages import Message

__all__ = ["Message", "WireError", "decode", "encode"]
