"""The kernels on a GPU against their definitions in float64, at sizes that cross every tile. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from async_rl_kernels import backend, linear_logprob, reference
from async_rl_kernels.head_gradient import HeadGradient
from async_rl_kernels.segment_gradient import Segments, weight_norm_squares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

LENGTHS = [700, 0, 1, 129, 2600, 64, 3]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; NaN when anything is."""
    return float((got.double() - want).norm() / want.norm())


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64).to(dtype)


def poison() -> None:
    """Memory that is handed out next holds NaN: an output that is not written shows."""
    torch.full((1 << 27,), torch.nan, device="cuda")


def test_triton_is_picked() -> None:
    assert backend("cuda") == "triton"


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"), [(300, 896, 151_936), (9000, 256, 5001), (33, 8192, 97), (1, 64, 97)]
)
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 8e-3)]
)
def test_log_probs_and_gradients(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, of_value: float, of_gradient: float
) -> None:
    h = random(tokens, hidden, seed=0, dtype=dtype).requires_grad_()
    w = (2 * random(vocabulary, hidden, seed=1, dtype=dtype) / hidden**0.5).requires_grad_()
    y = torch.randint(vocabulary, (tokens,), device="cuda")
    up = random(3, tokens, seed=2, dtype=torch.float64)
    poison()
    got = linear_logprob(h, w, y, temperature=0.7)
    columns = torch.stack([got.log_prob, got.entropy, got.prob_square_sum])
    grads = torch.autograd.grad((columns * up).sum(), (h, w))
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    want = torch.stack(reference.linear_logprob(h64, w64, y, temperature=0.7))
    want_grads = torch.autograd.grad((want * up).sum(), (h64, w64))
    for a, b in zip(columns, want, strict=True):
        assert error(a, b.detach()) < of_value
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < of_gradient


@pytest.mark.parametrize(("width", "out"), [(1024, 2816), (896, 128), (80, 48)])
def test_weight_norms_of_segments(width: int, out: int) -> None:
    a = random(sum(LENGTHS), width, seed=0, dtype=torch.bfloat16)
    gs = [random(sum(LENGTHS), out, seed=n, dtype=torch.bfloat16) for n in (1, 2, 3)]
    segments = Segments(LENGTHS, "cuda")
    none = torch.zeros(len(LENGTHS), dtype=torch.float64, device="cuda")
    want = [reference.segmented_weight_grad(a.double(), g.double(), LENGTHS, none)[0] for g in gs]
    poison()
    assert error(weight_norm_squares(a, gs, segments), sum(want, none)) < 1e-5
    poison()
    assert error(weight_norm_squares(a, gs[:1], segments), want[0]) < 1e-5


def test_the_head_of_exact_baselines() -> None:
    h = random(sum(LENGTHS), 256, seed=0, dtype=torch.bfloat16)
    w = random(20_000, 256, seed=1, dtype=torch.bfloat16) / 16
    y = torch.randint(20_000, (sum(LENGTHS),), device="cuda")
    c = random(sum(LENGTHS), seed=2, dtype=torch.float32)
    poison()
    head = HeadGradient(h, w, y, Segments(LENGTHS, "cuda"), temperature=0.8)
    grad_hidden, norms = head.backward(c)
    total = torch.zeros(20_000, 256, device="cuda")
    head.accumulate(total, torch.ones_like(c))
    g = reference.logit_gradients(h.double(), w.double(), y, c.double(), temperature=0.8)
    none = torch.zeros(len(LENGTHS), dtype=torch.float64, device="cuda")
    squares, weight, _ = reference.segmented_weight_grad(h.double(), g, LENGTHS, none)
    assert error(grad_hidden, g @ w.double()) < 8e-3
    assert error(norms, squares) < 8e-3
    assert error(total, weight) < 8e-3
