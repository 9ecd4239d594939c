"""Parts of a micro-batch side by side: the numbers of one forward and backward, the same bits every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.trainer import lanes
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import MicroBatch, pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

CONFIG = DecoderConfig(
    family="qwen3", vocabulary=12, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16,
    max_context=256, qk_norm=True, tied=True,
)  # fmt: skip


def packed(*, common: int, shared: bool, groups: int = 10, prompt: int = 24) -> MicroBatch:
    """Groups of four whose prompts begin with `common` tokens alike, answers of 8 to 24 tokens."""
    random = np.random.default_rng(0)
    begin = random.integers(0, 12, common)
    made = []
    for group in range(groups):
        own = np.concatenate((begin, random.integers(0, 12, prompt - common)))
        for sample in range(4):
            n = int(random.integers(8, 25))
            tokens = np.concatenate((own, random.integers(0, 12, n))).astype(np.int32)
            made.append(
                Trajectory(
                    group=group, sample=sample, problem=0, split="train", seed=0, tokens=tokens,
                    log_behaviour=np.zeros(len(tokens), np.float32), turns=(Turn(start=prompt, length=n),),
                    versions=(VersionSpan(version=0, start=prompt, end=prompt + n),), reward=0.0, ended="finished",
                )
            )  # fmt: skip
    return pack_batch(made, micro_batch_tokens=1 << 20, shared=shared).micro_batches[0]


def gradients(micro: MicroBatch, number: int) -> tuple[Tensor, list[Tensor]]:
    model = Decoder(CONFIG)
    model.initialise(0, std=0.2)
    found = log_probs(model, micro, ModelArithmetic(temperature=0.9, lanes=number))
    pull = torch.linspace(-1, 1, len(found.log_prob))
    loss = (pull * found.log_prob).sum() + 0.1 * found.entropy.sum()
    return found.log_prob.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(("common", "shared"), [(0, True), (9, True), (0, False)])
@pytest.mark.parametrize("number", [2, 3])
def test_the_gradient_is_that_of_one_lane(common: int, shared: bool, number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lanes, "LEAST_ROWS", 16)
    micro = packed(common=common, shared=shared)
    parts = lanes.divided(micro, number)
    assert len(parts) == number
    sizes = [len(part.tokens) for part in parts]
    assert sum(sizes) == len(micro.tokens) + (number - 1) * common
    assert max(sizes) < 1.5 * min(sizes)
    alone, side_by_side = gradients(micro, 1), gradients(micro, number)
    torch.testing.assert_close(side_by_side[0], alone[0], rtol=1e-5, atol=1e-5)
    for found, expected in zip(side_by_side[1], alone[1], strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()
    again = gradients(micro, number)
    assert all(torch.equal(a, b) for a, b in zip(side_by_side[1], again[1], strict=True))
    with torch.no_grad():
        model = Decoder(CONFIG)
        model.initialise(0, std=0.2)
        without = log_probs(model, micro, ModelArithmetic(temperature=0.9, lanes=number)).log_prob
    assert torch.equal(without, side_by_side[0])


def test_columns_of_turns_that_have_a_temperature_and_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each policy token finds its row, its factor and its place again."""
    monkeypatch.setattr(lanes, "LEAST_ROWS", 16)
    micro = packed(common=9, shared=True)
    micro = replace(micro, stretch=torch.linspace(0.5, 2.0, len(micro.targets), dtype=torch.float64))
    model = Decoder(CONFIG)
    model.initialise(0, std=0.2)
    one, three = (
        log_probs(model, micro, ModelArithmetic(temperature=0.9, lanes=number), proxy_share=0.3) for number in (1, 3)
    )
    assert len(lanes.lane_parts(model, micro, ModelArithmetic(temperature=0.9, lanes=3))) == 3
    for name in ("log_prob", "entropy", "prob_square_sum", "log_proxy"):
        torch.testing.assert_close(getattr(three, name), getattr(one, name), rtol=1e-5, atol=1e-5)
    assert three.log_proxy is not None
    assert not three.log_proxy.requires_grad
    assert three.log_prob.requires_grad


def test_every_row_of_a_part_has_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the documents of all parts are those of the micro-batch, and rows before them have their positions."""
    monkeypatch.setattr(lanes, "LEAST_ROWS", 16)
    micro = packed(common=9, shared=True)
    documents = []
    for part in lanes.divided(micro, 3):
        assert part.tree is not None
        assert torch.equal(part.tokens, part.tokens[torch.from_numpy(part.tree.row_of_token[part.tree.token_of_row])])
        bounds = np.cumsum((0, *part.documents))
        for begin, end in pairwise(bounds.tolist()):
            rows = torch.from_numpy(part.tree.row_of_token[begin:end])
            assert part.positions[rows].tolist() == list(range(end - begin))
            documents.append(tuple(part.tokens[rows].tolist()))
    assert micro.tree is not None
    of_token = micro.tokens[torch.from_numpy(micro.tree.row_of_token)]
    expected = [tuple(document.tolist()) for document in of_token.split(list(micro.documents))]
    assert sorted(documents) == sorted(expected)


@pytest.mark.parametrize(
    ("common", "groups", "prompt"),
    [(0, 2, 24), (160, 10, 164), (0, 1, 24)],
    ids=["too few rows", "most rows are before all others", "one group, whose prompt is before all others"],
)
def test_what_is_not_worth_dividing_stays_whole(common: int, groups: int, prompt: int) -> None:
    micro = packed(common=common, shared=True, groups=groups, prompt=prompt)
    assert lanes.divided(micro, 2) == []
    assert torch.equal(gradients(micro, 2)[0], gradients(micro, 1)[0])


def test_an_error_in_a_lane_is_the_callers() -> None:
    def refused(number: int) -> int:
        raise RuntimeError(f"lane {number}")

    with pytest.raises(RuntimeError, match="lane 0"):
        lanes.in_lanes(lambda n: refused(n) if n == 0 else n, [0, 1])


@pytest.mark.parametrize(("threads", "each"), [(1, 1), (4, 2), (5, 2)])
def test_lanes_share_the_threads(threads: int, each: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert lanes.in_lanes(lambda _: torch.get_num_threads(), [0, 1]) == [each, each]
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            lanes.in_lanes(lambda n: 1 / n, [1, 0])
        assert torch.get_num_threads() == threads, "also behind an error"
    finally:
        torch.set_num_threads(before)
