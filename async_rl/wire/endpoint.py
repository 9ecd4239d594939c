"""Endpoints as a user writes them, and what ZeroMQ is given."""

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


# -------------------- library
# What the ZeroMQ library at hand can do.


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    pyzmq: str
    libzmq: str
    ipc: bool
    """Unix sockets"""
    curve: bool
    """encryption and keys, needed for TCP"""


def library() -> Library:
    return Library(pyzmq=zmq.pyzmq_version(), libzmq=zmq.zmq_version(), ipc=zmq.has("ipc"), curve=zmq.has("curve"))


# -------------------- host
# Which machine this is: two processes on one may share memory.

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """The same for every process since the machine was started, another on every other machine."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


LONGEST_IPC_PATH = 107
"""bytes, the size of a Unix socket's address on Linux"""
EVERYWHERE = "0.0.0.0"
LOOPBACK = "127.0.0.1"
FORM = "it must look like ipc://PATH or tcp://HOST:PORT"


def free_port() -> int:
    """Of the loopback, free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def tcp_address(endpoint: str) -> tuple[str, str]:
    """(host, port) of a tcp endpoint; without a host it is the loopback, `*` and 0.0.0.0 are every interface.

    The port is a number, or `*` for one the system chooses. Raises UserError."""
    host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not colon or not (port == "*" or port.isdecimal()):
        raise UserError(f"wire.endpoint: cannot use {endpoint}: {FORM}")
    if port.isdecimal() and int(port) > 65535:  # ZeroMQ would wrap it
        raise UserError(f"wire.endpoint: {endpoint} has a port above 65535")
    return {"": LOOPBACK, "*": EVERYWHERE}.get(host, host), port


def as_bound(endpoint: str) -> str:
    """What a socket is to listen on."""
    if not is_tcp(endpoint):
        return endpoint
    host, port = tcp_address(endpoint)
    return f"tcp://{host}:{port}"


def as_reached_from_here(endpoint: str) -> str:
    """Where processes of the same host find what is bound there."""
    if not is_tcp(endpoint):
        return endpoint
    host, port = tcp_address(endpoint)
    return f"tcp://{LOOPBACK if host == EVERYWHERE else host}:{port}"


def beside(endpoint: str, chosen: str) -> str:
    """Where another socket of the same host listens: as chosen, or (auto) on a free port beside `endpoint`."""
    return f"tcp://{tcp_address(endpoint)[0]}:*" if chosen == "auto" else chosen


def as_reached_by(endpoint: str, reached: str) -> str:
    """Where a socket bound to `endpoint` is found by one that reaches another of the same host at `reached`."""
    host, port = tcp_address(endpoint)
    return f"tcp://{tcp_address(reached)[0] if host == EVERYWHERE else host}:{port}"


def require_keys(endpoint: str, keys: Keys | None) -> str:
    """The endpoint as ZeroMQ is given it. Raises UserError for TCP without keys: nothing is served openly."""
    if is_tcp(endpoint) and keys is None:
        raise UserError(
            f"wire.endpoint: {endpoint} needs keys: make them with `async-rl keys DIR` and name the folder in "
            "wire.keys=DIR"
        )
    return as_bound(endpoint)


def socket_file(endpoint: str) -> Path | None:
    """The file of an ipc endpoint that has one. Raises UserError for what ZeroMQ would not refuse clearly."""
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
