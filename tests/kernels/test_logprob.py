"""linear_logprob against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl_kernels import linear_logprob, reference


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 17),
    hidden=st.sampled_from([1, 8, 33]),
    vocabulary=st.sampled_from([2, 7, 97]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    chunk_tokens=st.sampled_from([1, 3, 64]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_equal_the_definition_for_any_chunking(
    tokens: int, hidden: int, vocabulary: int, temperature: float, chunk_tokens: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=random, dtype=torch.float64).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64).requires_grad_()
    y = torch.randint(vocabulary, (tokens,), generator=random)
    up, up_entropy = torch.randn(2, tokens, generator=random, dtype=torch.float64)

    got = linear_logprob(h, w, y, temperature=temperature, chunk_elements=chunk_tokens * vocabulary)
    got_grads = torch.autograd.grad((got.log_prob * up + got.entropy * up_entropy).sum(), (h, w))
    want = reference.linear_logprob(h, w, y, temperature=temperature)
    want_grads = torch.autograd.grad((want[0] * up + want[1] * up_entropy).sum(), (h, w))

    torch.testing.assert_close((got.log_prob, got.entropy, got.prob_square_sum), want)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_within_its_stated_error(dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    h = torch.randn(50, 64, generator=random, dtype=torch.float64).to(dtype)
    w = (torch.randn(97, 64, generator=random, dtype=torch.float64) / 8).to(dtype)
    y = torch.randint(97, (50,), generator=random)
    got = linear_logprob(h, w, y)
    want = reference.linear_logprob(h.double(), w.double(), y)
    assert got.log_prob.dtype == torch.float32
    for a, b in zip((got.log_prob, got.entropy, got.prob_square_sum), want, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64), temperature=0.0)
