"""TCP for those with a known key; whoever else comes gets nothing and disturbs nobody."""

import os
import random
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from async_rl.errors import UserError
from async_rl.wire.channel import Dealer, Router
from async_rl.wire.endpoint import as_bound, as_reached_from_here, tcp_address
from async_rl.wire.keys import Keys, make_keys, show_key
from async_rl.wire.messages import Query, Snapshot

SOON_S = 20.0


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path / "keys")


@pytest.fixture
def router(keys: Keys) -> Iterator[Router]:
    with Router("tcp://:*", keys=keys) as made:
        yield made


def serves(router: Router, keys: Keys, name: str = "trainer") -> None:
    """A peer with the key is answered."""
    with Dealer(router.endpoint, name, keys=keys) as dealer:
        dealer.send(Query())
        assert router.receive(SOON_S) == (name.encode(), Query())
        assert router.send(name.encode(), Snapshot(counts={"secret": 1}))
        assert dealer.receive(SOON_S, "an answer") == Snapshot(counts={"secret": 1})


def turned_away(router: Router, at_least: int, reason: str = "") -> int:
    """Serve until so many have been counted, for this reason; nothing of theirs arrives meanwhile."""
    assert router.gate is not None
    deadline = time.monotonic() + SOON_S
    while (router.gate.reasons[reason] if reason else router.gate.turned_away) < at_least:
        assert router.receive(0.02) is None
        assert time.monotonic() < deadline, router.gate.reasons
    return router.gate.turned_away


def test_secret_files_are_for_their_owner_and_nothing_is_overwritten(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = make_keys(tmp_path / "new" / "keys").folder
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert sorted(modes) == ["client.key", "client.key_secret", "server.key", "server.key_secret"]
    assert modes["client.key_secret"] == modes["server.key_secret"] == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.listdir(folder.parent) == ["keys"]
    content = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="never overwritten"):
        make_keys(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == content


def test_tcp_without_keys_is_refused_on_both_ends(tmp_path: Path) -> None:
    for make in (lambda: Router("tcp://127.0.0.1:*"), lambda: Dealer("tcp://127.0.0.1:5555", "trainer")):
        with pytest.raises(UserError, match=r"async-rl keys.*wire\.keys"):
            make()


@pytest.mark.parametrize(
    ("written", "bound", "reached"),
    [
        ("tcp://:5555", "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://127.0.0.1:5555"),
        ("tcp://0.0.0.0:5555", "tcp://0.0.0.0:5555", "tcp://127.0.0.1:5555"),
        ("tcp://10.0.0.3:5555", "tcp://10.0.0.3:5555", "tcp://10.0.0.3:5555"),
        ("ipc://a/b", "ipc://a/b", "ipc://a/b"),
    ],
)
def test_an_endpoint_is_on_the_loopback_unless_written_otherwise(written: str, bound: str, reached: str) -> None:
    assert as_bound(written) == bound
    assert as_reached_from_here(written) == reached


def test_a_listening_socket_without_a_host_is_on_the_loopback(router: Router) -> None:
    assert tcp_address(router.endpoint)[0] == "127.0.0.1"


def test_a_peer_with_the_key_is_served(router: Router, keys: Keys) -> None:
    serves(router, keys)
    assert router.gate is not None
    router.gate.poll()
    assert router.gate.turned_away == 0


def test_a_peer_whose_public_key_is_put_into_the_folder_is_let_in_at_once(
    router: Router, keys: Keys, tmp_path: Path
) -> None:
    serves(router, keys)
    other = make_keys(tmp_path / "other").folder
    (other / "server.key").write_bytes((keys.folder / "server.key").read_bytes())
    (keys.folder / "another-host.key").write_bytes((other / "client.key").read_bytes())
    serves(router, Keys(other), "elsewhere")


@pytest.mark.parametrize("who", ["no CURVE", "a strange key", "another server's key"])
def test_a_stranger_gets_nothing_is_counted_and_disturbs_nobody(
    router: Router, keys: Keys, tmp_path: Path, who: str
) -> None:
    strange = make_keys(tmp_path / "strange").folder
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.set(zmq.IDENTITY, b"trainer")  # the identity of another does not help
        if who == "a strange key":
            (strange / "server.key").write_bytes((keys.folder / "server.key").read_bytes())
        if who != "no CURVE":
            pair = Keys(strange).client()
            dealer.curve_publickey, dealer.curve_secretkey = pair.public, pair.secret
            dealer.curve_serverkey = Keys(strange).server_public()
        dealer.connect(router.endpoint)
        dealer.send(b"let me in")
        turned_away(router, 1, who)
        serves(router, keys)
        assert not dealer.poll(0)


def test_plain_bytes_on_the_port_disturb_nobody(router: Router, keys: Keys) -> None:
    address = tcp_address(router.endpoint)
    randomly = random.Random(0)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03"
    inputs = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00" + bytes(100),  # ZMTP 1
        greeting + b"\x00NULL".ljust(21, b"\0") + bytes(300),
        greeting + b"\x00CURVE".ljust(21, b"\0") + bytes(31) + b"\x04\xc8\x05HELLO" + bytes(194),
        *(randomly.randbytes(randomly.randrange(1, 400)) for _ in range(30)),
        *(greeting + randomly.randbytes(randomly.randrange(1, 400)) for _ in range(30)),
    ]
    for sent in inputs:
        with socket.create_connection((address[0], int(address[1]))) as peer:
            peer.sendall(sent)
            peer.settimeout(SOON_S)
            answer = b""
            with suppress(OSError):  # it may have been thrown out already
                peer.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while part := peer.recv(4096):
                    answer += part
        # a greeting of ZMTP and the word that it is not taken: nothing of ours
        assert len(answer) <= 256
    assert turned_away(router, len(inputs)) == len(inputs)
    serves(router, keys)


def test_without_an_authenticator_nobody_is_let_in(router: Router, keys: Keys) -> None:
    """What libzmq would do by default is to let everybody in who speaks CURVE."""
    assert router.gate is not None
    router.gate.close()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        show_key(dealer, keys)
        dealer.connect(router.endpoint)
        dealer.send(b"let me in")
        assert router._socket.poll(300) == 0
