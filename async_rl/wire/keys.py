"""CURVE keys: who may speak with a run over TCP.

A folder of keys holds `server.key` and `client.key`, which are public, and their `.key_secret` files, which
are not. The run's own host needs the whole folder. A host of joined generators needs `server.key`,
`client.key` and `client.key_secret`. Every other `*.key` file in the run's folder is the public key of a
further peer that is let in; it is looked for anew with every connection.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from async_rl.errors import UserError

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
        return frozenset(
            self._read(path.name)[0] for path in self.folder.glob("*.key") if path.name != f"{SERVER}.key"
        )

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
