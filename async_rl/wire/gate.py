"""Who is let in over TCP: pyzmq's authenticator with the known keys, and a count of those it turned away.

Who waits for whom: the authenticator answers on a thread of its own, so a stranger costs the socket's owner
nothing. A peer without CURVE, with a strange key, or that takes this for another server never gets as far
as a message.
"""

from __future__ import annotations

from collections import Counter

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from async_rl.errors import UserError
from async_rl.wire.keys import Keys

_WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_DOMAIN = "async-rl"
_CUT_OFF = 3
"""greetings that ended early, after which that was no accident"""
_MOST_AT_ONCE = 1000
"""events read in one look"""


class _Known:
    """What the authenticator asks about each key."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return key in self._keys.admitted()
        except UserError:  # a damaged file beside the good ones
            return False


class Gate:
    """Guards one listening socket; make it before the socket is bound, look at it now and then."""

    def __init__(self, context: zmq.Context, guarded: zmq.Socket, keys: Keys) -> None:
        """Raises UserError when the keys are not there."""
        own = keys.server()
        keys.admitted()  # what is damaged is said now
        self._events: Counter[int] = Counter()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, _Known(keys))
        guarded.curve_server = True
        # else libzmq lets everybody in who speaks CURVE while no authenticator is there to be asked
        guarded.zap_domain = _DOMAIN.encode()
        guarded.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        guarded.curve_publickey, guarded.curve_secretkey = own.public, own.secret
        guarded.monitor("inproc://gate", _WATCHED)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)  # else a flood of strangers would hold up the socket itself
        self._monitor.connect("inproc://gate")

    def look(self) -> None:
        """Take in what happened at the socket."""
        for _ in range(_MOST_AT_ONCE):
            if not self._monitor.poll(0):
                return
            self._events[int(parse_monitor_message(self._monitor.recv_multipart())["event"])] += 1

    @property
    def turned_away(self) -> int:
        """Connections that showed no known key, up to the last look; one that is being greeted counts, too."""
        return self._events[zmq.EVENT_ACCEPTED] - self._events[zmq.EVENT_HANDSHAKE_SUCCEEDED]

    @property
    def reasons(self) -> dict[str, int]:
        """Of `turned_away`, as far as they are known."""
        failed = self._events
        return {
            "a strange key": failed[zmq.EVENT_HANDSHAKE_FAILED_AUTH],
            "another server's key": failed[zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL],
            "no CURVE": failed[zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL],
        }

    def close(self) -> None:
        self._monitor.close(linger=0)
        self._authenticator.stop()


class Reception:
    """Whether a connecting socket is let in; make it before the socket is connected."""

    def __init__(self, context: zmq.Context, connecting: zmq.Socket) -> None:
        self._failed: Counter[int] = Counter()
        connecting.monitor("inproc://reception", _WATCHED)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)
        self._monitor.connect("inproc://reception")

    @property
    def turned_away(self) -> bool:
        """The server said so, or ended the greeting again and again."""
        while self._monitor.poll(0):
            self._failed[int(parse_monitor_message(self._monitor.recv_multipart())["event"])] += 1
        cut_off = self._failed[zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL] + self._failed[zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL]
        return self._failed[zmq.EVENT_HANDSHAKE_FAILED_AUTH] > 0 or cut_off >= _CUT_OFF


def show_key(connecting: zmq.Socket, keys: Keys) -> None:
    """Let a connecting socket prove who it is, and speak to nobody but the run's server. Raises UserError."""
    own = keys.client()
    connecting.curve_serverkey = keys.server_public()
    connecting.curve_publickey, connecting.curve_secretkey = own.public, own.secret
