"""linear_logprob against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from async_rl_kernels import linear_logprob, reference
from async_rl_kernels.logprob import Tiles, VocabularySums


def inputs(tokens: int, hidden: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden states, weight, targets, and three columns of upstream gradients"""
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=random, dtype=torch.float64)
    w = 2 * torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64) / hidden**0.5
    y = torch.randint(vocabulary, (tokens,), generator=random)
    up = torch.randn(3, tokens, generator=random, dtype=torch.float64)
    return [h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), y, up]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 17),
    hidden=st.sampled_from([1, 8, 33]),
    vocabulary=st.sampled_from([2, 7, 97]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    rows=st.sampled_from([1, 3, 64]),
    ids=st.sampled_from([1, 5, 97]),
    columns=st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]),
    capped=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_equal_the_definition_for_any_tiling(
    tokens: int,
    hidden: int,
    vocabulary: int,
    temperature: float,
    rows: int,
    ids: int,
    columns: tuple[int, ...],
    capped: bool,
    seed: int,
) -> None:
    h, w, y, up = inputs(tokens, hidden, vocabulary, seed)
    cap = 0.2 + up[0].abs() if capped else None
    tiles = Tiles(tokens=tokens, vocabulary=vocabulary, rows=rows, ids=min(ids, vocabulary))
    got = linear_logprob(h, w, y, temperature=temperature, cap=cap, tiles=tiles)
    got_columns = (got.log_prob, got.entropy, got.prob_square_sum)
    want_columns = reference.linear_logprob(h, w, y, temperature=temperature, cap=cap)
    got_loss, want_loss = (
        sum((on * (column * up_).sum() for on, column, up_ in zip(columns, found, up, strict=True) if on), start=0.0)
        for found in (got_columns, want_columns)
    )
    torch.testing.assert_close(got_columns, want_columns, rtol=1e-9, atol=1e-11)
    got_grads = torch.autograd.grad(got_loss, (h, w))
    want_grads = torch.autograd.grad(want_loss, (h, w))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-9, atol=1e-11)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 100_000),
    vocabulary=st.sampled_from([1, 20, 97, 4096, 151_936]),
    elements=st.sampled_from([1, 1000, 1 << 22, 1 << 25]),
    least_rows=st.sampled_from([1, 1024, 8192]),
)
def test_tiles_cover_everything_once_and_stay_within_their_size(
    tokens: int, vocabulary: int, elements: int, least_rows: int
) -> None:
    tiles = Tiles.fitting(tokens, vocabulary, elements=elements, least_rows=least_rows)
    assert tiles.rows * tiles.ids <= elements
    for parts, length in ((tiles.row_parts, tokens), (tiles.id_parts, vocabulary)):
        assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
        assert (parts[-1].stop if parts else 0) == length
    assert tiles.single == (tokens * vocabulary <= elements)


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(40, 64, 151_936), (300, 8192, 97), (1500, 64, 3000)])
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"), [(torch.float32, 5e-6, 5e-6), (torch.bfloat16, 5e-6, 4e-3)]
)
def test_low_precision_stays_within_its_stated_error(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, of_value: float, of_gradient: float
) -> None:
    """||got - want|| / ||want|| for the same inputs in float64. Everything inside is float32; gradients are
    rounded to the dtype of the inputs at the end."""
    h, w, y, up = inputs(tokens, hidden, vocabulary, 0, dtype)
    got = linear_logprob(h, w, y, temperature=0.7)
    got_grads = torch.autograd.grad((got.log_prob * up[0]).sum(), (h, w))
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    want = reference.linear_logprob(h64, w64, y, temperature=0.7)
    want_grads = torch.autograd.grad((want[0] * up[0]).sum(), (h64, w64))
    assert got.log_prob.dtype == torch.float32
    for a, b in zip((got.log_prob, got.entropy, got.prob_square_sum), want, strict=True):
        assert (a.double() - b).norm() / b.norm() < of_value
    for a, b in zip(got_grads, want_grads, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < of_gradient


def test_inputs_are_rounded_for_products_only() -> None:
    h, w, y, up = inputs(40, 16, 97, 0, torch.float32)
    tiles = Tiles(tokens=40, vocabulary=97, rows=16, ids=50)
    got = linear_logprob(h, w, y, products=torch.bfloat16, tiles=tiles)
    got_grads = torch.autograd.grad((got.log_prob * up[0]).sum(), (h, w))
    h64, w64 = (x.detach().bfloat16().double().requires_grad_() for x in (h, w))
    want = reference.linear_logprob(h64, w64, y)
    want_grads = torch.autograd.grad((want[0] * up[0]).sum(), (h64, w64))
    for a, b in zip((got.log_prob, *got_grads), (want[0], *want_grads), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() / b.norm() < 5e-6


def test_logits_as_large_as_float32_holds_do_not_overflow() -> None:
    h, w, y, _ = inputs(9, 8, 30, 1, torch.float32)
    want = reference.linear_logprob(h.double() * 1e4, w.double() * 1e4, y)
    tiles = Tiles(tokens=9, vocabulary=30, rows=4, ids=7)
    got = linear_logprob(h * 1e4, w * 1e4, y, tiles=tiles)
    torch.testing.assert_close(got.log_prob.double(), want[0], rtol=1e-5, atol=1e3)
    assert got.entropy.isfinite().all()


def test_a_second_backward_gives_the_same_gradient() -> None:
    h, w, y, up = inputs(9, 8, 30, 1)
    loss = (linear_logprob(h, w, y).log_prob * up[0]).sum()
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (h, w)), first, rtol=0, atol=0)


def test_a_weight_that_is_frozen_gets_no_gradient_and_hidden_states_get_theirs() -> None:
    h, w, y, up = inputs(9, 8, 30, 1)
    (want,) = torch.autograd.grad((linear_logprob(h, w, y).log_prob * up[0]).sum(), h)
    (got,) = torch.autograd.grad((linear_logprob(h, w.detach(), y).log_prob * up[0]).sum(), h)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_nothing_larger_than_a_tile_or_an_input_is_ever_made() -> None:
    h, w, y, up = inputs(700, 16, 900, 2, torch.float32)
    tiles = Tiles.fitting(700, 900, elements=20_000, least_rows=100)
    with Largest() as largest:
        (linear_logprob(h, w, y, tiles=tiles).log_prob * up[0]).sum().backward()
    assert largest.elements == 20_000


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_parts_of_a_vocabulary_combine_to_the_whole_in_any_grouping(cuts: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = 30 * torch.randn(5, sum(cuts), generator=random, dtype=torch.float64)

    def sums(x: Tensor) -> Tensor:
        low = x - x.amax(1, keepdim=True)
        e = low.exp()
        return torch.stack([x.amax(1), e.sum(1), (e * low).sum(1), e.square().sum(1), x[:, 0]])

    parts = [sums(x) for x in logits.split(cuts, 1)]
    whole = sums(logits)
    got = VocabularySums(columns=torch.stack(parts, 1)).combined()
    left = VocabularySums(columns=torch.stack(parts[:1] + parts[1:2], 1)).combined().columns
    nested = VocabularySums(columns=torch.stack([left, *parts[2:]], 1)).combined()
    for found in (got, nested):
        torch.testing.assert_close(found.columns[:4], whole[:4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.chosen, torch.stack(parts, 1)[4].sum(0), rtol=1e-12, atol=1e-12)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), temperature=0.0)


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match=f"a target is {target}, the vocabulary has 3 ids"):
        linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([target]))


@pytest.mark.parametrize("capped", [False, True])
def test_logits_that_are_kept_and_those_computed_again_give_the_same_bits_twice(
    monkeypatch: pytest.MonkeyPatch, capped: bool
) -> None:
    found = []
    for most in (1 << 25, 0):
        monkeypatch.setattr("async_rl_kernels.logprob.CPU_KEPT", most)
        h, w, y, up = inputs(13, 8, 97, 0, torch.float32)
        cap = 0.2 + up[0].abs().float() if capped else None
        tiles = Tiles(tokens=13, vocabulary=97, rows=5, ids=40)
        got = linear_logprob(h, w, y, temperature=0.7, cap=cap, tiles=tiles)
        loss = (up[0] * got.log_prob + up[1] * got.entropy + up[2] * got.prob_square_sum).sum()
        found.append([torch.autograd.grad(loss, [h, w], retain_graph=True) for _ in range(2)])
    first = found[0][0]
    for every in (*found[0], *found[1]):
        assert all(torch.equal(a, b) for a, b in zip(every, first, strict=True))


def test_a_long_head_is_right_without_kept_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl_kernels.logprob.CPU_KEPT", 0)
    h, w, y, up = inputs(13, 8, 97, 1)
    got = linear_logprob(h, w, y, tiles=Tiles(tokens=13, vocabulary=97, rows=5, ids=40))
    want = reference.linear_logprob(h, w, y)
    for a, b in zip(
        torch.autograd.grad((up[0] * got.log_prob + up[1] * got.entropy).sum(), [h, w]),
        torch.autograd.grad((up[0] * want[0] + up[1] * want[1]).sum(), [h, w]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
