"""CURVE keys (`Keys`), and who is let in over TCP with them (`Gate` where a socket listens, `Reception` where one
connects).

A folder of keys holds `server.key` and `client.key`, which are public, and their `.key_secret` files, which are not.
The run's own host needs the whole folder. A host of joined generators needs `server.key`, `client.key` and
`client.key_secret`. Every other `*.key` file in the run's folder is the public key of a further peer that is let in;
the folder is read again with every connection.

Who waits for whom: pyzmq's authenticator answers on a thread of its own, so a stranger costs the socket's owner
nothing. A peer without CURVE, with a strange key, or that takes this for another server gets no message through.
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

SERVER, CLIENT = "server", "client"
_KEY_CHARACTERS = 40
"""characters of one key, in the Z85 alphabet"""
_WATCHED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_DOMAIN = "async-rl"
_CUT_OFF = 3
"""handshakes that ended early, after which that was no accident"""
_MOST_AT_ONCE = 1000
"""events read in one poll"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """A public key and its secret, Z85."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in a folder. Each file is read when it is needed: a generator's host has no server secret."""

    folder: Path

    def server(self) -> KeyPair:
        """Keys of the listening side. Raises UserError when the file is missing or can be read by others."""
        return self._pair(SERVER)

    def client(self) -> KeyPair:
        """Keys of the connecting side. Raises UserError likewise."""
        return self._pair(CLIENT)

    def server_public(self) -> bytes:
        """The server's public key, which a client must know so that it talks to no other server."""
        return self._read(f"{SERVER}.key")[0]

    def admitted(self) -> frozenset[bytes]:
        """Public keys of the peers that are let in, as the folder holds them now."""
        return frozenset(self._read(path.name)[0] for path in self.folder.glob("*.key") if path.name != f"{SERVER}.key")

    def _pair(self, name: str) -> KeyPair:
        path = self.folder / f"{name}.key_secret"
        public, secret = self._read(path.name)
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{path} can be read by others than its owner; chmod 600 {path}, or make new keys")
        if secret is None:
            raise UserError(f"{path} holds no secret key; `async-rl keys` makes keys")
        return KeyPair(public=public, secret=secret)

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


@dataclass(frozen=True, slots=True)
class RelayKeys(Keys):
    """The same folder at a relay of weights, which has no server's secret: it listens with the client's pair, and who
    connects to it expects that one."""

    def server(self) -> KeyPair:
        return self.client()

    def server_public(self) -> bytes:
        return self._read(f"{CLIENT}.key")[0]


def keys_in(folder: str) -> Keys | None:
    """The keys a setting names; None where it is empty."""
    return Keys(Path(folder)) if folder else None


def make_keys(folder: Path) -> Keys:
    """Make both pairs in a new folder that only its owner can enter. Raises UserError when the folder is not empty."""
    if not zmq.has("curve"):
        raise UserError("this pyzmq was built without CURVE; install the wheel from PyPI")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; keys are never overwritten, name another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # made where nobody else can enter, then moved to its place whole
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name in (SERVER, CLIENT):
            _, secret = zmq.auth.create_certificates(partial, name)
            os.chmod(secret, 0o600)
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    return Keys(folder)


class _Known:
    """Answers the authenticator's question whether a key is known."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return key in self._keys.admitted()
        except UserError:  # a damaged file beside the good ones
            return False


class Gate:
    """Guards one listening socket. Make it before the socket is bound, and poll it now and then."""

    def __init__(self, context: zmq.Context, guarded: zmq.Socket, keys: Keys) -> None:
        """Raises UserError when the keys are not there."""
        own = keys.server()
        keys.admitted()  # so that a damaged file is reported now
        self._events: Counter[int] = Counter()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN, _Known(keys))
        guarded.curve_server = True
        # without it, libzmq lets everybody in who speaks CURVE while no authenticator runs
        guarded.zap_domain = _DOMAIN.encode()
        guarded.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        guarded.curve_publickey, guarded.curve_secretkey = own.public, own.secret
        guarded.monitor("inproc://gate", _WATCHED)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)  # without it, a flood of strangers would hold up the socket itself
        self._monitor.connect("inproc://gate")

    def poll(self) -> None:
        """Read the events of the socket."""
        for _ in range(_MOST_AT_ONCE):
            if not self._monitor.poll(0):
                return
            self._events[int(parse_monitor_message(self._monitor.recv_multipart())["event"])] += 1

    @property
    def turned_away(self) -> int:
        """Connections that showed no known key, up to the last poll; one in its handshake counts, too."""
        return self._events[zmq.EVENT_ACCEPTED] - self._events[zmq.EVENT_HANDSHAKE_SUCCEEDED]

    @property
    def reasons(self) -> dict[str, int]:
        """Connections of `turned_away` by reason, as far as reasons are known."""
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
    """Tells whether a connecting socket is let in. Make it before the socket is connected."""

    def __init__(self, context: zmq.Context, connecting: zmq.Socket) -> None:
        self._failed: Counter[int] = Counter()
        connecting.monitor("inproc://reception", _WATCHED)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)
        self._monitor.connect("inproc://reception")

    @property
    def turned_away(self) -> bool:
        """Whether the server refused the key, or ended the handshake again and again."""
        while self._monitor.poll(0):
            self._failed[int(parse_monitor_message(self._monitor.recv_multipart())["event"])] += 1
        cut_off = self._failed[zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL] + self._failed[zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL]
        return self._failed[zmq.EVENT_HANDSHAKE_FAILED_AUTH] > 0 or cut_off >= _CUT_OFF


def show_key(connecting: zmq.Socket, keys: Keys) -> None:
    """Let a connecting socket prove who it is, and talk to nobody but the run's server. Raises UserError."""
    own = keys.client()
    connecting.curve_serverkey = keys.server_public()
    connecting.curve_publickey, connecting.curve_secretkey = own.public, own.secret
