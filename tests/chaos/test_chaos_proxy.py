"""The proxy passes bytes on unchanged; a cut loses what is under way and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from async_rl.instruments.chaos.proxy import Proxy
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router

WAIT_S = 10.0


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "far.sock"))
        made.listen()
        made.settimeout(WAIT_S)
        yield made


def dial(proxy: Proxy) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(WAIT_S)
    made.connect(str(proxy.path))
    return made


def read(source: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer when the other side is gone."""
    found = b""
    try:
        while len(found) < count and (some := source.recv(1 << 16)):
            found += some
    except ConnectionResetError:
        pass
    return found


def test_bytes_arrive_unchanged_both_ways_on_many_connections(tmp_path: Path, listening: socket.socket) -> None:
    random = Random(0)
    with Proxy(tmp_path / "near.sock", tmp_path / "far.sock") as proxy:
        for size in (1, 70_000, 3_000_000):
            there, back = random.randbytes(size), random.randbytes(size)
            with dial(proxy) as near, listening.accept()[0] as far:
                far.settimeout(WAIT_S)
                ends = ((near, there), (far, back))
                writers = [threading.Thread(target=end.sendall, args=(data,)) for end, data in ends]
                for writer in writers:
                    writer.start()
                assert read(far, size) == there
                assert read(near, size) == back
                for writer in writers:
                    writer.join()
                near.close()
                assert read(far, 1) == b""
        assert proxy.bytes_lost == 0
    assert not proxy.path.exists()


def test_a_cut_loses_what_is_under_way_and_both_sides_see_it(tmp_path: Path, listening: socket.socket) -> None:
    with Proxy(tmp_path / "near.sock", tmp_path / "far.sock") as proxy:
        with dial(proxy) as near, listening.accept()[0] as far:
            far.settimeout(WAIT_S)
            near.sendall(b"before")
            assert read(far, 6) == b"before"
            cut = proxy.hold(0.5)
            near.sendall(b"under way")
            assert cut() == 1
            assert read(far, 100) == b""
            assert read(near, 100) == b""
        with dial(proxy) as near, listening.accept()[0] as far:
            near.sendall(b"again")
            assert read(far, 5) == b"again"


def test_nobody_behind_the_proxy_is_like_nobody_there(tmp_path: Path) -> None:
    with Proxy(tmp_path / "near.sock", tmp_path / "far.sock") as proxy, dial(proxy) as near:
        assert read(near, 1) == b""
        assert proxy.connections == 0


def test_peers_connect_again_after_a_cut(tmp_path: Path) -> None:
    with (
        Router(f"ipc://{tmp_path / 'far.sock'}") as router,
        Proxy(tmp_path / "near.sock", tmp_path / "far.sock") as proxy,
        Dealer(f"ipc://{proxy.path}", "trainer") as dealer,
    ):
        for step in range(3):
            assert arrives(dealer, router, msg.NextBatch(step=step))
            assert proxy.hold(0.1 * step)() == 1


def arrives(dealer: Dealer, router: Router, message: msg.Message) -> bool:
    """Said again and again, as by every process that hears nothing."""
    for _ in range(200):
        dealer.send(message)
        if (received := router.receive(0.05)) is not None and received[1] == message:
            return True
    return False
