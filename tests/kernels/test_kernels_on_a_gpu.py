"""The kernels on a GPU against their definitions in float64, at sizes that cross every tile. `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from async_rl_kernels import backend, linear_logprob, reference, segmented_weight_grad
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
def test_weight_gradients_of_segments(width: int, out: int) -> None:
    a = random(sum(LENGTHS), width, seed=0, dtype=torch.bfloat16)
    gs = [random(sum(LENGTHS), out, seed=n, dtype=torch.bfloat16) for n in (1, 2, 3)]
    m = random(len(LENGTHS), seed=4, dtype=torch.float32)
    segments = Segments(LENGTHS, "cuda")
    want = [reference.segmented_weight_grad(a.double(), g.double(), LENGTHS, m.double()) for g in gs]
    poison()
    assert error(weight_norm_squares(a, gs, segments), sum(each[0] for each in want)) < 1e-5
    poison()
    got = segmented_weight_grad(a, gs[0], segments, m, dtype=torch.float32)
    assert error(got.norm_squares, want[0][0]) < 1e-5
    assert error(got.total, want[0][1]) < 1e-5
    assert error(got.weighted, want[0][2]) < 4e-3
    many = [3] * (sum(LENGTHS) // 3)
    of_short = segmented_weight_grad(a[: sum(many)], gs[0][: sum(many)], Segments(many, "cuda"), m.new_ones(len(many)))
    assert error(of_short.total, gs[0][: sum(many)].double().T @ a[: sum(many)].double()) < 4e-3


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


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
@pytest.mark.parametrize("rule", ["none", "ppo", "truncate", "interval", "cispo"])
def test_ratios_of_segments(level: str, rule: str) -> None:
    lengths, turns = [5, 0, 3000, 1, 77, 400], [2, 0, 1, 3]
    columns = random(3, sum(lengths), seed=0, dtype=torch.float32)
    chosen = Rule(level=level, rule=rule)  # type: ignore[arg-type]
    poison()
    got = segment_ratio(*columns, Turns(lengths, turns, "cuda"), chosen)
    want = reference.segment_ratio(*columns.double(), lengths, turns, **asdict(chosen))
    found = got.ratio, got.clipped, got.coefficient, got.turn_sum, got.trajectory_sum
    assert (found[1] != want[1]).float().mean() < 1e-3  # decisions at the very edge may differ in float32
    for number in (0, 3, 4):
        assert error(found[number], want[number]) < 1e-5
    assert error(found[2], want[2]) < 2e-2
