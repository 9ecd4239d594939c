"""Endpoints as a user writes them and as ZeroMQ takes them; this machine's name and its ZeroMQ library."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from async_rl.errors import UserError

if TYPE_CHECKING:
    from async_rl.wire.keys import Keys

LONGEST_IPC_PATH = 107
"""bytes of a Unix socket's path on Linux"""
EVERYWHERE = "0.0.0.0"
LOOPBACK = "127.0.0.1"
FORM = "it must look like ipc://PATH or tcp://HOST:PORT"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def free_port() -> int:
    """A port of the loopback that was free a moment ago."""
    with hold_port() as held:
        return port_of(held)


def hold_port(address: str = LOOPBACK) -> socket.socket:
    """A socket that holds a port of this machine, at one of its addresses, until it is closed: the system gives the
    port to nobody who asks for any. A program that sets SO_REUSEADDR, as ZeroMQ and torch do, can listen there all
    the same, since nobody listens here."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, 0))
    return held


def port_of(held: socket.socket) -> int:
    """The port that a socket is bound to."""
    return int(held.getsockname()[1])


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def tcp_address(endpoint: str) -> tuple[str, str]:
    """(host, port) of a tcp endpoint. No host means the loopback; `*` and 0.0.0.0 mean every interface. The port is a
    number, or `*` for one that the system chooses. Raises UserError."""
    host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not colon or not (port == "*" or port.isdecimal()):
        raise UserError(f"wire.endpoint: cannot use {endpoint}: {FORM}")
    if port.isdecimal() and int(port) > 65535:  # ZeroMQ would wrap it
        raise UserError(f"wire.endpoint: {endpoint} has a port above 65535")
    return {"": LOOPBACK, "*": EVERYWHERE}.get(host, host), port


def is_loopback(endpoint: str) -> bool:
    """Whether a tcp endpoint is reached from its own machine alone."""
    host = tcp_address(endpoint)[0]
    return host == "localhost" or host.startswith("127.") or host in ("[::1]", "::1")


def as_bound(endpoint: str) -> str:
    """The endpoint that a listening socket is given."""
    if not is_tcp(endpoint):
        return endpoint
    host, port = tcp_address(endpoint)
    return f"tcp://{host}:{port}"


def as_reached_from_here(endpoint: str) -> str:
    """The endpoint at which processes of the same host reach a socket that listens on `endpoint`."""
    if not is_tcp(endpoint):
        return endpoint
    host, port = tcp_address(endpoint)
    return f"tcp://{LOOPBACK if host == EVERYWHERE else host}:{port}"


def beside(endpoint: str, chosen: str) -> str:
    """The endpoint of a second socket: `chosen`, or for "auto" a free port on the host of `endpoint`."""
    return f"tcp://{tcp_address(endpoint)[0]}:*" if chosen == "auto" else chosen


def as_reached_by(endpoint: str, reached: str) -> str:
    """The endpoint at which to reach a socket that listens on `endpoint`, for a process that reaches another socket of
    the same host at `reached`."""
    host, port = tcp_address(endpoint)
    return f"tcp://{tcp_address(reached)[0] if host == EVERYWHERE else host}:{port}"


def require_keys(endpoint: str, keys: Keys | None) -> str:
    """The endpoint that ZeroMQ is given. Raises UserError for TCP without keys: nothing is served openly."""
    if is_tcp(endpoint) and keys is None:
        raise UserError(
            f"wire.endpoint: {endpoint} needs keys: make them with `async-rl keys DIR` and name the folder in "
            "wire.keys=DIR"
        )
    return as_bound(endpoint)


def socket_file(endpoint: str) -> Path | None:
    """The file of an ipc endpoint, None when it has none. Raises UserError for an endpoint that ZeroMQ would not refuse
    clearly."""
    if not endpoint.startswith(("ipc://", "tcp://")):
        raise UserError(f"wire.endpoint: cannot use {endpoint}: {FORM}")
    if is_tcp(endpoint):
        tcp_address(endpoint)
        return None
    path = endpoint.removeprefix("ipc://")
    if path in ("", "*") or path.startswith("@"):
        return None
    if len(os.fsencode(path)) > LONGEST_IPC_PATH:
        raise UserError(
            f"wire.endpoint: the socket's path {path} is longer than {LONGEST_IPC_PATH} bytes; "
            "use a shorter one, such as ipc:///tmp/NAME.sock"
        )
    return Path(path)


def this_host() -> str:
    """A name that is the same for every process since this machine was started, and another on every other machine:
    two processes of one host may share memory."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True, slots=True, kw_only=True)
class ZmqLibrary:
    """What the ZeroMQ library of this installation can do."""

    pyzmq: str
    """its version"""
    libzmq: str
    """its version"""
    ipc: bool
    """Unix sockets"""
    curve: bool
    """encryption and keys, needed for TCP"""


def library() -> ZmqLibrary:
    return ZmqLibrary(pyzmq=zmq.pyzmq_version(), libzmq=zmq.zmq_version(), ipc=zmq.has("ipc"), curve=zmq.has("curve"))
