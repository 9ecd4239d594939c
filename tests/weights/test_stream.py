"""Weights of a real segment through a real weight server, over TCP with keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from async_rl.weights import WeightPublisher, WeightReader, WeightsError
from async_rl.weights.stream import Shelf, WeightStream, answer
from async_rl.wire.channel import Router
from async_rl.wire.keys import Keys, make_keys

SOON_S = 30.0


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(700, 300, generator=generator),
        "norm": torch.randn(7, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([seed]),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@contextmanager
def served(path: Path, keys: Keys) -> Iterator[str]:
    """The endpoint of a weight server on a thread."""
    over, endpoint, ready = threading.Event(), [""], threading.Event()

    def serve() -> None:
        with Router("tcp://:*", keys=keys) as router, WeightReader(path) as reader:
            endpoint[0] = router.endpoint
            ready.set()
            shelf = Shelf(reader.latest, reader.copy, chunk_bytes=100_000)
            while not over.is_set():
                answer(router, shelf)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(SOON_S)
        yield endpoint[0]
    finally:
        over.set()
        thread.join()


def test_what_was_published_arrives_bit_for_bit(tmp_path: Path) -> None:
    keys, path = make_keys(tmp_path / "keys"), tmp_path / "weights"
    with (
        WeightPublisher(path, tensors(0)) as publisher,
        served(path, keys) as endpoint,
        WeightStream(endpoint, "generator/weights", keys=keys, timeout_s=SOON_S) as stream,
    ):
        for version in (0, 1, 5):
            publisher.publish(tensors(version), version)
            got, weights = stream.read()
            assert got == version
            assert same(weights, tensors(version))


def test_a_fetch_that_does_not_come_on_says_what_it_waited_for(tmp_path: Path) -> None:
    keys, path = make_keys(tmp_path / "keys"), tmp_path / "weights"
    with (
        served(path, keys) as endpoint,
        WeightStream(endpoint, "a", keys=keys, timeout_s=0.5) as stream,
        pytest.raises(WeightsError, match=r"0\.5 s .*newer than version -1 \(the trainer has published nothing\)"),
    ):
        stream.read()


def test_a_reader_with_a_strange_key_gets_nothing(tmp_path: Path) -> None:
    keys, path = make_keys(tmp_path / "keys"), tmp_path / "weights"
    strange = make_keys(tmp_path / "strange").folder
    (strange / "server.key").write_bytes((keys.folder / "server.key").read_bytes())
    with WeightPublisher(path, tensors(0)) as publisher, served(path, keys) as endpoint:
        publisher.publish(tensors(1), 1)
        with (
            WeightStream(endpoint, "a", keys=Keys(strange), timeout_s=0.5) as stream,
            pytest.raises(WeightsError, match="can it be reached, and is it this run's"),
        ):
            stream.read()
        with WeightStream(endpoint, "a", keys=keys, timeout_s=SOON_S) as stream:
            assert stream.read()[0] == 1
