"""Triton's work on a tile of logits, in its interpreter, against torch operations and the definition."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from async_rl_kernels import linear_logprob, logprob_triton, reference
from async_rl_kernels.logprob import Pull, Tiles, VocabularySums
from async_rl_kernels.logprob_triton import TritonTile


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 16, 97]),
    rows=st.sampled_from([1, 3, 8]),
    ids=st.sampled_from([1, 16, 50, 97]),
    block=st.sampled_from([1, 16, 64]),
    temperature=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_log_probs_and_gradients_equal_the_definition(
    tokens: int, vocabulary: int, rows: int, ids: int, block: int, temperature: float, seed: int
) -> None:
    if vocabulary * tokens // min(ids, block) > 100:  # a program takes milliseconds here
        rows, ids, block = 8, 64, 64
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, 8, generator=random).requires_grad_()
    w = torch.randn(vocabulary, 8, generator=random).requires_grad_()
    y = torch.randint(vocabulary, (tokens,), generator=random)
    up = torch.randn(3, tokens, generator=random, dtype=torch.float64)
    tiles = Tiles(tokens=tokens, vocabulary=vocabulary, rows=rows, ids=min(ids, vocabulary))
    with patch.object(logprob_triton, "BLOCK", block):
        got = linear_logprob(h, w, y, temperature=temperature, tiles=tiles, kernels=TritonTile())
        columns = torch.stack([got.log_prob, got.entropy, got.prob_square_sum])
        grads = torch.autograd.grad((columns * up).sum(), (h, w))
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    want = torch.stack(reference.linear_logprob(h64, w64, y, temperature=temperature))
    want_grads = torch.autograd.grad((want * up).sum(), (h64, w64))
    torch.testing.assert_close(columns.double(), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * (1 + b.norm())


def test_every_sum_is_written_and_nothing_beside_the_rows() -> None:
    out = VocabularySums.empty((7,), torch.float32, torch.device("cpu"))
    out.columns.fill_(torch.nan)
    TritonTile().sums(torch.randn(3, 37), torch.tensor([0, 36, -1]), 1.0, out.rows(slice(2, 5)))
    assert out.columns[:, 2:5].isfinite().all()
    assert out.columns[:, [0, 1, 5, 6]].isnan().all()
    assert out.chosen[4] == 0.0


def test_gradients_are_rounded_to_bfloat16_at_the_end_only() -> None:
    """Within one unit in the last place: the interpreter cuts off where a GPU rounds."""
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 37, generator=random)
    local = torch.tensor([0, 36, 5, -1])
    pull = Pull(log_normaliser=torch.logsumexp(logits, 1), log_prob=torch.randn(4, generator=random))
    exact = TritonTile().gradient(logits.clone(), local, 1.0, pull, torch.float32)
    rounded = TritonTile().gradient(logits, local, 1.0, pull, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=2**-7, atol=0)


def test_a_probability_of_zero_has_no_gradient_and_makes_no_nan() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    pull = Pull(
        log_normaliser=torch.logsumexp(logits, 1), log_prob=torch.ones(1), entropy=(torch.ones(1), torch.ones(1))
    )
    found = TritonTile().gradient(logits, torch.tensor([0]), 1.0, pull, torch.bfloat16)
    assert found[0, 1] == 0.0
    assert found.isfinite().all()
