"""Real sockets: routing, deadlines with names, hostile peers, endpoints that cannot be used."""

import asyncio
import multiprocessing
import os
import signal
import socket
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import zmq

from async_rl.errors import UserError
from async_rl.trajectory.codec import WireError
from async_rl.wire.channel import LONGEST_IPC_PATH, AsyncDealer, Dealer, Router, WireTimeout, ipc_endpoint
from async_rl.wire.keys import make_keys
from async_rl.wire.messages import Accepted, Holds, NextBatch, Published, Query, Refused, Snapshot

PROCESSES = multiprocessing.get_context("spawn")


def endpoint(folder: Path) -> str:
    return f"ipc://{folder}/buffer.sock"


def test_a_router_answers_the_peer_that_asked(tmp_path: Path) -> None:
    with (
        Router(endpoint(tmp_path)) as router,
        Dealer(router.endpoint, "trainer") as trainer,
        Dealer(router.endpoint, "launcher") as launcher,
    ):
        trainer.send(NextBatch(step=3))
        assert router.receive(5) == (b"trainer", NextBatch(step=3))
        launcher.send(Query())
        assert router.receive(5) == (b"launcher", Query())
        assert router.send(b"trainer", Refused(what="a", reason="b"))
        assert router.send(b"launcher", Snapshot(step=3))
        assert launcher.receive(5, "a snapshot") == Snapshot(step=3)
        assert trainer.receive(5, "a batch") == Refused(what="a", reason="b")
        assert router.receive(0) is None


def test_a_peer_that_is_not_there_is_noticed(tmp_path: Path) -> None:
    with Router(endpoint(tmp_path)) as router:
        assert not router.send(b"nobody", Query())


def test_a_dealer_says_who_waited_for_what_and_how_long(tmp_path: Path) -> None:
    with (
        Dealer(endpoint(tmp_path), "trainer") as trainer,
        pytest.raises(WireTimeout, match=r"trainer waited 0\.01 s for the buffer's batch of step 3"),
    ):
        trainer.receive(0.01, "the buffer's batch of step 3")


def test_what_was_sent_before_the_router_is_there_arrives(tmp_path: Path) -> None:
    with Dealer(endpoint(tmp_path), "trainer") as trainer:
        trainer.send(Published(version=1))
        with Router(endpoint(tmp_path)) as router:
            assert router.receive(5) == (b"trainer", Published(version=1))


def test_a_peer_that_comes_back_takes_its_identity_over(tmp_path: Path) -> None:
    with Router(endpoint(tmp_path)) as router, Dealer(router.endpoint, "generator-0") as first:
        first.send(Holds(version=1))
        assert router.receive(5) is not None
        with Dealer(router.endpoint, "generator-0") as second:
            second.send(Holds(version=2))
            assert router.receive(5) == (b"generator-0", Holds(version=2))
            assert router.send(b"generator-0", Accepted(pairs=()))
            assert second.receive(5, "an answer") == Accepted(pairs=())


def test_a_bad_message_is_counted_and_the_router_lives_on(tmp_path: Path) -> None:
    with Router(endpoint(tmp_path)) as router, zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.set(zmq.LINGER, 0)
        raw.set(zmq.IDENTITY, b"stranger")
        raw.connect(router.endpoint)
        raw.send_multipart([b"\x80\x04pickle", b"more"])
        received = router.receive(5)
        assert received is not None
        peer, error = received
        assert peer == b"stranger"
        assert isinstance(error, WireError)
        assert sum(router.refused.values()) == 1
        with Dealer(router.endpoint, "trainer") as trainer:
            trainer.send(Query())
            assert router.receive(5) == (b"trainer", Query())


def test_an_oversized_frame_is_not_received(tmp_path: Path) -> None:
    with (
        Router(endpoint(tmp_path), max_message_bytes=1000) as router,
        Dealer(router.endpoint, "large") as large,
        Dealer(router.endpoint, "small") as small,
    ):
        large.send(Snapshot(counts={"x" * 2000: 1}))
        small.send(Query())
        assert router.receive(5) == (b"small", Query())
        assert router.receive(0) is None


def test_an_async_dealer_receives_by_deadline_and_loses_nothing_when_cancelled(tmp_path: Path) -> None:
    async def generator(router: Router) -> None:
        dealer = AsyncDealer(router.endpoint, "generator-0")
        try:
            with pytest.raises(WireTimeout, match=r"generator-0 waited 0\.01 s for a permit"):
                await dealer.receive(0.01, "a permit")
            waiting = asyncio.create_task(dealer.receive())
            await dealer.send(Holds(version=1))
            waiting.cancel()
            assert await asyncio.to_thread(router.receive, 5) == (b"generator-0", Holds(version=1))
            router.send(b"generator-0", Accepted(pairs=((1, 2),)))
            assert await dealer.receive(5) == Accepted(pairs=((1, 2),))
        finally:
            dealer.close()

    with Router(endpoint(tmp_path)) as router:
        asyncio.run(generator(router))


def test_an_endpoint_in_use_is_refused_and_its_owner_undisturbed(tmp_path: Path) -> None:
    with Router(endpoint(tmp_path)) as router, Dealer(router.endpoint, "trainer") as trainer:
        with pytest.raises(UserError, match=r"wire\.endpoint.*in use.*another"):
            Router(endpoint(tmp_path))
        trainer.send(Query())
        assert router.receive(5) == (b"trainer", Query())
    keys = make_keys(tmp_path / "keys")
    with (
        Router("tcp://127.0.0.1:*", keys=keys) as router,
        pytest.raises(UserError, match=r"wire\.endpoint.*in use"),
    ):
        Router(router.endpoint, keys=keys)


@pytest.mark.parametrize(
    "bad",
    [
        "buffer.sock",
        "ipc://" + "x" * 200,
        "tcp://no-such-interface:5",
        "tcp://127.0.0.1:99999",
        "ipc:///no/such/folder/b.sock",
    ],
)
def test_an_endpoint_that_cannot_be_used_names_the_setting(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UserError, match=r"wire\.endpoint"):
        Router(bad, keys=make_keys(tmp_path / "keys"))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "buffer.sock").write_text("mine")
    with pytest.raises(UserError, match="no socket"):
        Router(endpoint(tmp_path))
    assert (tmp_path / "buffer.sock").read_text() == "mine"


def test_the_socket_file_goes_with_its_owner(tmp_path: Path) -> None:
    with Router(endpoint(tmp_path)):
        assert stat.S_ISSOCK((tmp_path / "buffer.sock").stat().st_mode)
    assert not (tmp_path / "buffer.sock").exists()


def test_the_socket_file_of_a_dead_owner_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "buffer.sock"))
    with Router(endpoint(tmp_path)) as router, Dealer(router.endpoint, "trainer") as trainer:
        trainer.send(Query())
        assert router.receive(5) == (b"trainer", Query())


def test_a_run_folder_with_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    assert ipc_endpoint(tmp_path) == f"ipc://{tmp_path}/buffer.sock"
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    short = ipc_endpoint(deep)
    assert len(os.fsencode(short.removeprefix("ipc://"))) <= LONGEST_IPC_PATH
    assert short == ipc_endpoint(deep)
    assert short != ipc_endpoint(deep / "other")
    with Router(short):
        pass


def echo(endpoint: str, pipe: Connection) -> None:
    """A router that answers version v with v + 1 until it is killed."""
    with Router(endpoint) as router:
        pipe.send("ready")
        while True:
            received = router.receive(1)
            if received is not None and isinstance(received[1], Holds):
                router.send(received[0], Holds(version=received[1].version + 1))


def test_a_router_that_is_killed_and_started_again_is_found_by_its_peers(tmp_path: Path) -> None:
    with Dealer(endpoint(tmp_path), "trainer") as trainer:
        for round_number in range(2):
            ready, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=echo, args=(endpoint(tmp_path), theirs), daemon=True)
            process.start()
            try:
                assert ready.poll(30)
                trainer.send(Holds(version=round_number))
                assert trainer.receive(30, "an answer") == Holds(version=round_number + 1)
            finally:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
