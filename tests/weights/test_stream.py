"""Weights of a real segment through a real weight server, over TCP with keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_weights import SOON_S, same, served, tensors

from async_rl.weights import WeightPublisher, WeightsError
from async_rl.weights.stream import WeightStream
from async_rl.wire.keys import Keys, make_keys


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
