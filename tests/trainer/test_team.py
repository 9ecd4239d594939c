"""What the leader says to the other ranks while it is busy with what they need not help with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_run import quick_settings
from torch import Tensor

from async_rl.trainer.__main__ import limit_memory
from async_rl.trainer.publish import Both
from async_rl.trainer.ranks import Ranks
from async_rl.trainer.team import KEEPALIVE_S, KeepAlive, Order, Team, decode, weights_hash
from async_rl.weights.link import Staged


class Leader:
    """Of two ranks; what it says is kept."""

    leads, size, rank = True, 2, 0

    def __init__(self) -> None:
        self.said: list[Order] = []

    def broadcast_bytes(self, payload: bytes) -> bytes:
        self.said.append(decode(payload))
        return payload


class WholeLearner:
    """Its model is not sharded."""

    model = torch.nn.Linear(2, 2)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name in "abcd":
            yield name, torch.ones(2)


def test_a_leader_that_hashes_whole_weights_says_between_them_that_it_is_there() -> None:
    ranks: Any = Leader()
    learner: Any = WholeLearner()
    now = 0.0
    team = Team(ranks, clock=lambda: now)

    def slowly() -> Iterator[tuple[str, Tensor]]:
        nonlocal now
        for pair in team.weights(learner):
            now += KEEPALIVE_S / 2  # what is done with each takes so long
            yield pair

    weights_hash(slowly())
    assert ranks.said == [KeepAlive(), KeepAlive()]


def test_a_leader_whose_publication_waits_for_a_transfer_says_that_it_is_there() -> None:
    staged = Staged({"a": (2,)}, torch.float32, "cpu")
    said: list[str] = []
    held = staged.held("generator-0", 1.0)
    held.__enter__()

    def still() -> None:
        said.append("still")
        if len(said) == 2:  # by then it was waited for a while
            held.__exit__(None, None, None)

    staged.write([("a", torch.ones(2))], 1, 60.0, still)
    assert said == ["still", "still"]
    assert staged.version == 1


def test_a_leader_that_copies_what_is_staged_says_that_it_is_there() -> None:
    staged = Staged({"a": (2,), "b": (2,)}, torch.float32, "cpu")
    said: list[str] = []

    class Sink:
        def publish(self, tensors: Any, version: int) -> None:
            if not isinstance(tensors, list):
                list(tensors)

    sink: Any = Sink()
    Both(sink, staged, sink, lambda: said.append("still")).publish([], 1)
    assert said == ["still", "still"]


def test_ranks_are_closed_at_a_good_end_only(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: closed.append("closed"))
    mesh: Any = object()
    with pytest.raises(ValueError, match="why"), Ranks(rank=0, size=2, mesh=mesh, timeout_s=1.0):
        raise ValueError("why")
    assert closed == []
    with Ranks(rank=0, size=2, mesh=mesh, timeout_s=1.0):
        pass
    assert closed == ["closed"]


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", None)])
def test_memory_is_limited_on_the_gpu_that_trains(
    device: str, number: int | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[float, int | None]] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda *given: found.append(given))
    limit_memory(quick_settings(tiny_model, f"trainer.device={device}", "trainer.memory_share=0.5"))
    assert found == [(0.5, number)]
