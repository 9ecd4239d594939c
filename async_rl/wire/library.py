"""What the ZeroMQ library at hand can do."""

from __future__ import annotations

from dataclasses import dataclass

import zmq


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    pyzmq: str
    libzmq: str
    ipc: bool
    """Unix sockets"""
    curve: bool
    """encryption and keys, needed for TCP"""


def library() -> Library:
    return Library(
        pyzmq=zmq.pyzmq_version(), libzmq=zmq.zmq_version(), ipc=zmq.has("ipc"), curve=zmq.has("curve")
    )
