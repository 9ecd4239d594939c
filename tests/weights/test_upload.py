"""Weights of a rank 0 on another machine: into the run's shared memory, whole, over a connection of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from support_weights import SOON_S, content, same, served, tensors

from async_rl.errors import RunFailed
from async_rl.weights import WeightReader
from async_rl.weights.shared_memory import TensorPlace, WeightCopy, layout_to_json, shared_folder
from async_rl.weights.stream import Intake, SegmentOfIntake, Shelf, Transfer, WeightStream
from async_rl.weights.upload import WeightUpload
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router
from async_rl.wire.keys import Keys, make_keys


def run_with_intake(path: Path, keys: Keys) -> AbstractContextManager[str]:
    """The endpoint of a run's weight server, on a thread, whose trainer is elsewhere; `path`: of its segment."""
    return served(path, keys, Intake(SegmentOfIntake(path).publish))


def test_a_version_is_in_the_runs_memory_when_publish_returns(tmp_path: Path) -> None:
    keys, path = make_keys(tmp_path / "keys"), tmp_path / "weights"
    with (
        run_with_intake(path, keys) as endpoint,
        WeightReader(path) as beside,
        WeightStream(endpoint, "far/weights", keys=keys, timeout_s=SOON_S) as far,
    ):
        upload = WeightUpload(endpoint, tensors(0), keys=keys, timeout_s=SOON_S)
        for version in (0, 1, 5):
            upload.publish(tensors(version), version)
            got, weights = beside.read(0.0)  # it waits for nothing
            assert got == version
            assert same(weights, tensors(version))
            assert far.read()[0] == version
        assert same(upload.held()[5], tensors(5))
        upload.close()
    assert not list((shared_folder() or tmp_path).glob("async-rl-upload-*"))


def test_a_server_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    keys = make_keys(tmp_path / "keys")
    with Router("tcp://:*", keys=keys) as silent:
        upload = WeightUpload(silent.endpoint, tensors(0), keys=keys, timeout_s=0.3)
        with pytest.raises(RunFailed, match=r"waited 0\.3 s \(wire\.timeout_s\) for the run's weight server at tcp://"):
            upload.publish(tensors(0), 0)
        upload.close()


@pytest.fixture
def intake() -> tuple[Intake, list[Transfer]]:
    published: list[Transfer] = []
    return Intake(published.append), published


def test_lost_answers_and_repeated_words_change_nothing(intake: tuple[Intake, list[Transfer]]) -> None:
    """Every message of the way is lost once; both ends repeat."""
    end, published = intake
    layout = layout_to_json([TensorPlace(name="w", dtype="uint8", shape=(100,), offset=0)])
    shelf = Shelf(lambda: 3, lambda: WeightCopy(version=3, layout=layout, content=content(3, 100)), chunk_bytes=16)
    now, lost = 0.0, set()
    to_server: list[msg.Message] = [msg.Upload(version=3)]
    for _ in range(200):
        now += 1.0
        asks: list[msg.Message] = [*end.tick(now)]
        for message in to_server:
            asks += end.handle(b"t", message, now)
        if any(isinstance(ask, msg.Holds) for ask in asks):
            break
        to_server = [msg.Upload(version=3)] if not asks else []
        for ask in asks:
            key = repr(ask)
            if key not in lost:
                lost.add(key)
                continue
            to_server += shelf.handle(b"", ask, now)
    (whole,) = published
    assert np.array_equal(whole.content, content(3, 100))
    assert end.handle(b"t", msg.Upload(version=3), now) == [msg.Holds(version=3)]
    assert len(lost) >= 2


def test_nobody_else_sends_weights_and_an_impossible_offer_ends_nothing(intake: tuple[Intake, list[Transfer]]) -> None:
    end, published = intake
    assert end.handle(b"t", msg.Upload(version=1), 0.0) == [msg.AskWeights(after=-1)]
    (refused,) = end.handle(b"other", msg.Upload(version=9), 0.0)
    assert isinstance(refused, msg.Refused)
    assert "there is a trainer already" in refused.reason
    bad = msg.Offer(version=1, num_bytes=10, chunk_bytes=4, checksum=0, layout="{")
    (refused,) = end.handle(b"t", bad, 0.0)
    assert isinstance(refused, msg.Refused)
    assert end.handle(b"t", msg.Upload(version=1), 0.0) == [msg.AskWeights(after=-1)]
    assert not published
