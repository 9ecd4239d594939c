"""Segment gradients against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl_kernels import reference, segment_gradient
from async_rl_kernels.head_gradient import HeadGradient
from async_rl_kernels.segment_gradient import Segments, embedding_norm_squares, segment_sums, weight_norm_squares

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 32, 33, 70]), min_size=1, max_size=9)
WIDTHS = st.sampled_from([1, 3, 17, 64])
SEEDS = st.integers(0, 2**31)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS, width=WIDTHS, outs=st.lists(WIDTHS, min_size=1, max_size=3), seed=SEEDS)
def test_weight_norms_equal_the_gradients_formed_one_by_one(
    lengths: list[int], width: int, outs: list[int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    a = torch.randn(rows, width, generator=random, dtype=torch.float64)
    gs = [torch.randn(rows, out, generator=random, dtype=torch.float64) for out in outs]
    none = torch.zeros(len(lengths), dtype=torch.float64)
    want = sum((reference.segmented_weight_grad(a, g, lengths, none)[0] for g in gs), none)
    close(weight_norm_squares(a, gs, Segments(lengths)), want)


@pytest.mark.parametrize("width", [4, 48])  # formed directly; from Gram matrices
def test_weight_norms_do_not_depend_on_how_the_work_is_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = [9, 40, 1, 0, 22, 40, 23]
    a, g = torch.randn(2, sum(lengths), width, generator=random, dtype=torch.float64)
    want = weight_norm_squares(a, [g], Segments(lengths))
    monkeypatch.setattr(segment_gradient, "BUCKET_ROWS", 45)
    monkeypatch.setattr(segment_gradient, "GRAM_BLOCK", 7)
    monkeypatch.setattr(segment_gradient, "DIRECT_TILE", 13)
    close(weight_norm_squares(a, [g], Segments(lengths)), want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-6)])
def test_weight_norms_of_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = [50, 3, 120]
    a, g = torch.randn(2, sum(lengths), 64, generator=random).to(dtype)
    got = weight_norm_squares(a, [g], Segments(lengths))
    want, _, _ = reference.segmented_weight_grad(a.double(), g.double(), lengths, torch.zeros(3).double())
    assert got.dtype == torch.float64
    assert ((got - want) / want).abs().max() < tolerance


def test_a_segment_with_nan_leaves_the_others_alone() -> None:
    a, g = torch.ones(6, 3), torch.ones(6, 2)
    a[4], g[4] = torch.nan, torch.nan
    found = weight_norm_squares(a, [g], Segments([3, 2, 1]))
    assert found[0] == 54.0
    assert found[1].isnan()
    assert found[2] == 6.0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=LENGTHS, repeats=st.sampled_from([1, 3]), seed=SEEDS)
def test_sums_of_segments_count_every_head(lengths: list[int], repeats: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths) * repeats, 5, generator=random, dtype=torch.float64)
    scale = torch.randn(len(values), generator=random, dtype=torch.float64)
    cuts = [n * repeats for n in lengths]
    close(segment_sums(values, Segments(lengths)), torch.stack([part.sum(0) for part in values.split(cuts)]))
    scaled = (scale[:, None] * values).split(cuts)
    close(segment_sums(values, Segments(lengths), scale), torch.stack([part.sum(0) for part in scaled]))


def test_sums_of_long_segments_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA one thread adds up a bag: none may be as long as an answer times its heads."""
    bags: list[int] = []

    def counted(rows: torch.Tensor, values: torch.Tensor, first: torch.Tensor, **words: Any) -> torch.Tensor:
        bags.append(int(torch.cat([first, torch.tensor([len(rows)])]).diff().max()))
        return sums(rows, values, first, **words)

    sums = F.embedding_bag
    monkeypatch.setattr(F, "embedding_bag", counted)
    lengths, heads = [5000, 0, 1, 64, 65, 3000, 0], 3
    values = torch.randn(sum(lengths) * heads, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.arange(len(values)) % 7 - 3.5
    want = torch.stack([part.sum(0) for part in (scale[:, None] * values).split([n * heads for n in lengths])])
    close(segment_sums(values, Segments(lengths), scale), want)
    assert max(bags) <= 80


def test_a_nan_stays_within_the_sums_of_its_segment() -> None:
    values = torch.ones(2 * 300, 3)
    values[2 * 200] = torch.nan
    found = segment_sums(values, Segments([150, 0, 100, 50]), torch.full((len(values),), 0.5))
    assert found[[0, 1, 3], 0].tolist() == [150.0, 0.0, 50.0]
    assert found[2].isnan().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=LENGTHS, vocabulary=st.sampled_from([1, 4, 50]), seed=SEEDS)
def test_embedding_norms_add_up_repeated_ids_first(lengths: list[int], vocabulary: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    d = torch.randn(sum(lengths), 3, generator=random, dtype=torch.float64)
    ids = torch.randint(vocabulary, (sum(lengths),), generator=random)
    each = reference.segmented_embedding_grad(d, ids, lengths, vocabulary)
    close(embedding_norm_squares(d, ids, Segments(lengths)), each.square().sum((1, 2)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=LENGTHS,
    vocabulary=st.sampled_from([2, 7, 97]),
    temperature=st.sampled_from([0.3, 1.0]),
    tile_elements=st.sampled_from([1, 50, 1 << 22]),
    tile_rows=st.sampled_from([1, 40]),
    seed=SEEDS,
)
def test_the_head_equals_its_definition_for_any_tiling(
    lengths: list[int], vocabulary: int, temperature: float, tile_elements: int, tile_rows: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    h = torch.randn(rows, 5, generator=random, dtype=torch.float64).requires_grad_()
    w = torch.randn(vocabulary, 5, generator=random, dtype=torch.float64).requires_grad_()
    y = torch.randint(vocabulary, (rows,), generator=random)
    c, m = torch.randn(2, rows, generator=random, dtype=torch.float64)

    head = HeadGradient(
        h.detach(), w.detach(), y, Segments(lengths), temperature=temperature,
        tile_elements=tile_elements, tile_rows=tile_rows,
    )  # fmt: skip
    grad_hidden, norms = head.backward(c)
    first = len(lengths) // 2
    late = torch.cat([torch.full((n,), float(i >= first), dtype=torch.float64) for i, n in enumerate(lengths)])
    total = torch.ones(vocabulary, 5, dtype=torch.float64)
    head.accumulate(total, m * late, first=first)

    g = reference.logit_gradients(h, w, y, c, temperature=temperature).detach()
    a = h.detach()
    close(norms, reference.segmented_weight_grad(a, g, lengths, torch.zeros(len(lengths)).double())[0])
    log_prob, _, _ = reference.linear_logprob(h, w, y, temperature=temperature)
    close(head.log_probs.log_prob, log_prob.detach())
    (want_hidden,) = torch.autograd.grad(-(c * log_prob).sum(), h, retain_graph=True)
    (want_weight,) = torch.autograd.grad(-(c * m * late * log_prob).sum(), w)
    torch.testing.assert_close(grad_hidden, want_hidden, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(total - 1, want_weight, rtol=1e-8, atol=1e-8)


def test_the_head_rounds_its_inputs_for_products_where_asked() -> None:
    random = torch.Generator().manual_seed(0)
    h, w = torch.randn(12, 5, generator=random), torch.randn(30, 5, generator=random)
    y, c = torch.randint(30, (12,), generator=random), torch.randn(12, generator=random)
    head = HeadGradient(h, w, y, Segments([7, 5]), temperature=0.7, products=torch.bfloat16)
    grad_hidden, norms = head.backward(c)
    total = torch.zeros(30, 5)
    head.accumulate(total, torch.ones(12))
    h64, w64 = h.bfloat16().double(), w.bfloat16().double()
    g = reference.logit_gradients(h64, w64, y, c.double(), temperature=0.7)
    squares, weight, _ = reference.segmented_weight_grad(h64, g, [7, 5], torch.zeros(2).double())
    assert grad_hidden.dtype == torch.float32
    for a, b in ((grad_hidden, g @ w64), (norms, squares), (total, weight)):
        assert (a.double() - b).norm() / b.norm() < 8e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=7),
    vocabulary=st.sampled_from([2, 7, 30]),
    tile_elements=st.sampled_from([1, 20, 1 << 22]),
    seed=SEEDS,
)
def test_the_cross_term_of_tied_weights_equals_the_product_of_both_gradients(
    sizes: list[tuple[int, int]], vocabulary: int, tile_elements: int, seed: int
) -> None:
    lengths, policy = [tokens for tokens, _ in sizes], [min(n, tokens) for tokens, n in sizes]
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(vocabulary, 4, generator=random, dtype=torch.float64)
    x = torch.randint(vocabulary, (sum(lengths),), generator=random)
    d = torch.randn(sum(lengths), 4, generator=random, dtype=torch.float64)
    h = torch.randn(sum(policy), 4, generator=random, dtype=torch.float64)
    y = torch.randint(vocabulary, (sum(policy),), generator=random)
    c = torch.randn(sum(policy), generator=random, dtype=torch.float64)

    head = HeadGradient(h, w, y, Segments(policy), temperature=0.7, tile_elements=tile_elements)
    head.backward(c)
    got = head.product_with_embedding(w[x], d, x, Segments(lengths))

    g = reference.logit_gradients(h, w, y, c, temperature=0.7)
    of_head = torch.stack([b.T @ a for a, b in zip(h.split(policy), g.split(policy), strict=True)])
    of_embedding = reference.segmented_embedding_grad(d, x, lengths, vocabulary)
    close(got, (of_head * of_embedding).sum((1, 2)))
