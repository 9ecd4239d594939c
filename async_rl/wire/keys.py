"""Who is let in over TCP: pyzmq's authenticator with the known keys, and a count of those it turned away.

Who waits for whom: the authenticator answers on a thread of its own, so a stranger costs the socket's owner
nothing. A peer without CURVE, with a strange key, or that takes this for another server never gets as far
as a message.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from async_rl.errors import UserError

# -------------------- keys
# CURVE keys: who may speak with a run over TCP.
#
# A folder of keys holds `server.key` and `client.key`, which are public, and their `.key_secret` files, which
# are not. The run's own host needs the whole folder. A host of joined generators needs `server.key`,
# `client.key` and `client.key_secret`. Every other `*.key` file in the run's folder is the public key of a
# further peer that is let in; it is looked for anew with every connection.

SERVER, CLIENT = "server", "client"
_KEY_CHARACTERS = 40
"""of one key, in the Z85 alphabet"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in a folder, read when they are needed: a generator's host has no server secret."""

    folder: Path

    def server(self) -> Pair:
        """Whose side listens. Raises UserError when the file is not there or not secret."""
        return self._pair(SERVER)

    def client(self) -> Pair:
        return self._pair(CLIENT)

    def server_public(self) -> bytes:
        """What a client must know of the server, so that it speaks to no other."""
        return self._read(f"{SERVER}.key")[0]

    def admitted(self) -> frozenset[bytes]:
        """Public keys of the peers that are let in, as the folder has them now."""
        return frozenset(self._read(path.name)[0] for path in self.folder.glob("*.key") if path.name != f"{SERVER}.key")

    def _pair(self, name: str) -> Pair:
        path = self.folder / f"{name}.key_secret"
        public, secret = self._read(path.name)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{path} can be read by others than its owner; chmod 600 {path}, or make new keys")
        if secret is None:
            raise UserError(f"{path} holds no secret key; `async-rl keys` makes keys")
        return Pair(public=public, secret=secret)

    def _read(self, name: str) -> tuple[bytes, bytes | None]:
        path = self.folder / name
        try:
            public, secret = zmq.auth.load_certificate(path)
        except OSError as error:
            why = error.strerror or "it is not there"
            remedy = f"`async-rl keys {self.folder}` makes keys"
            raise UserError(f"wire.keys: {path} cannot be read ({why}); {remedy}") from None
        except ValueError:
            raise UserError(f"wire.keys: {path} holds no key; `async-rl keys` makes keys") from None
        for key in (public, secret or public):
            if len(key) != _KEY_CHARACTERS:
                raise UserError(f"wire.keys: {path} holds a damaged key; `async-rl keys` makes keys")
        return public, secret


def keys_in(folder: str) -> Keys | None:
    """The keys a setting names; None where it is empty."""
    return Keys(Path(folder)) if folder else None


def make_keys(folder: Path) -> Keys:
    """Make both pairs in a new folder that only its owner can enter. Raises UserError when there is something."""
    if not zmq.has("curve"):
        raise UserError("this pyzmq was built without CURVE; install the wheel from PyPI")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; keys are never overwritten, name another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # made where nobody else can enter, then put in place whole
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name in (SERVER, CLIENT):
            _, secret = zmq.auth.create_certificates(partial, name)
            os.chmod(secret, 0o600)
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    return Keys(folder)


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
