"""A port that is held for a program that is to listen there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from async_rl.wire.channel import Router
from async_rl.wire.endpoint import hold_port, port_of
from async_rl.wire.keys import Keys, make_keys


def test_a_held_port_is_given_to_nobody_and_can_be_listened_on(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    with hold_port() as held:
        port = port_of(held)
        with Router(f"tcp://127.0.0.1:{port}", keys=Keys(tmp_path / "keys")):
            probe = socket.create_connection(("127.0.0.1", port), 10)
            probe.close()
        others = [hold_port() for _ in range(200)]
        assert port not in {port_of(one) for one in others}
        assert len({port_of(one) for one in others}) == 200
        for one in others:
            one.close()
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
