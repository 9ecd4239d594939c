"""Ports of the loopback that nobody else is given until the program under test listens there."""

from __future__ import annotations

import socket


class HeldPorts:
    """Holds ports: a port that was free a moment ago may be another process's by the time it is used.

    The system gives a bound port to nobody who asks for any port, and to no connection as its own end. A program that
    sets SO_REUSEADDR, as ZeroMQ, SLURM and torch do, can listen there all the same, since nobody listens here.
    """

    def __init__(self, number: int) -> None:
        self._sockets = [socket.socket() for _ in range(number)]
        for one in self._sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))

    @property
    def numbers(self) -> list[int]:
        return [int(one.getsockname()[1]) for one in self._sockets]

    def close(self) -> None:
        for one in self._sockets:
            one.close()
