"""Ports of the loopback that nobody else is given until the program under test listens there."""

from __future__ import annotations

from async_rl.wire.endpoint import hold_port, port_of


class HeldPorts:
    """Holds ports: one that was free a moment ago may be another process's by the time it is used."""

    def __init__(self, number: int) -> None:
        self._held = [hold_port() for _ in range(number)]
        self.numbers = [port_of(one) for one in self._held]

    def close(self) -> None:
        for one in self._held:
            one.close()
