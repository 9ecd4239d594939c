"""Triton's per-segment weight gradients, in its interpreter, against their definition."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from async_rl_kernels import reference
from async_rl_kernels import segment_gradient_triton as fast
from async_rl_kernels.segment_gradient import Segments

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=5)
SMALL_TILE = replace(fast.NORMS_TILE, out=16, into=32, rows=16)


def small() -> object:
    """Tiles that small tensors cross."""
    return patch.multiple(fast, GRAM_ROWS=16, GRAM_DEPTH=16, NORMS_TILE=SMALL_TILE, GROUP=2)


def layer(lengths: list[int], width: int, outs: list[int], seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    return torch.randn(rows, width, generator=random), [torch.randn(rows, n, generator=random) for n in outs]


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(lengths=LENGTHS, width=st.sampled_from([1, 20, 33]), out=st.sampled_from([1, 50]), seed=st.integers(0, 2**31))
def test_norms_of_tiles_walked_directly_equal_the_definition(
    lengths: list[int], width: int, out: int, seed: int
) -> None:
    a, (g,) = layer(lengths, width, [out], seed)
    every = tuple(i for i, n in enumerate(lengths) if n)
    with small():  # type: ignore[attr-defined]
        got = fast.direct_norm_squares(a, g, fast.blocks_of(Segments(lengths), every), len(lengths))
    none = torch.zeros(len(lengths), dtype=torch.float64)
    want, _, _ = reference.segmented_weight_grad(a.double(), g.double(), lengths, none)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lengths=LENGTHS,
    width=st.sampled_from([4, 33]),
    outs=st.lists(st.sampled_from([1, 5, 16, 20]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_norms_of_layers_that_share_an_input_equal_the_definition(
    lengths: list[int], width: int, outs: list[int], seed: int
) -> None:
    """Short segments by Gram matrices, long ones directly: with these sizes both occur."""
    a, gs = layer(lengths, width, outs, seed)
    with small():  # type: ignore[attr-defined]
        got = fast.norm_squares(a, gs, Segments(lengths))
    none = torch.zeros(len(lengths), dtype=torch.float64)
    want = sum((reference.segmented_weight_grad(a.double(), g.double(), lengths, none)[0] for g in gs), none)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_both_ways_are_taken_and_agree() -> None:
    lengths, width, out = [3, 64, 16], 24, 24
    a, (g,) = layer(lengths, width, [out], 0)
    segments = Segments(lengths)
    with small():  # type: ignore[attr-defined]
        cheap = [fast.gram_is_cheaper(n, width, out) for n in lengths]
        every = tuple(range(3))
        gram = fast.gram_norm_squares(a, [g], fast.Pairs.of(lengths, every, 16, segments.device))
        direct = fast.direct_norm_squares(a, g, fast.blocks_of(segments, every), 3)
    assert cheap == [False, False, False]
    with small():  # type: ignore[attr-defined]
        assert fast.gram_is_cheaper(3, 2048, 2048)
        assert not fast.gram_is_cheaper(4096, 2048, 2048)
    torch.testing.assert_close(gram, direct, rtol=1e-5, atol=1e-5)


def test_a_segment_with_nan_leaves_the_norms_of_the_others_alone() -> None:
    a, (g,) = layer([20, 5, 18], 8, [8], 1)
    a[22] = torch.nan
    segments = Segments([20, 5, 18])
    with small():  # type: ignore[attr-defined]
        direct = fast.direct_norm_squares(a, g, fast.blocks_of(segments, (0, 1, 2)), 3)
        gram = fast.gram_norm_squares(a, [g], fast.Pairs.of([20, 5, 18], (0, 1, 2), 16, segments.device))
    for found in (direct, gram):
        assert found.isnan().tolist() == [False, True, False]


def test_tensors_whose_columns_are_not_contiguous_are_taken_too() -> None:
    a, (g,) = layer([20, 5], 8, [12], 2)
    across = a.T.contiguous().T, g.T.contiguous().T
    segments = Segments([20, 5])
    with small():  # type: ignore[attr-defined]
        blocks, pairs = fast.blocks_of(segments, (0, 1)), fast.Pairs.of([20, 5], (0, 1), 16, segments.device)
        want = fast.direct_norm_squares(a, g, blocks, 2), fast.gram_norm_squares(a, [g], pairs)
        got = fast.direct_norm_squares(*across, blocks, 2), fast.gram_norm_squares(across[0], [across[1]], pairs)
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
