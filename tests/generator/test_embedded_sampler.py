"""Sampling: the right distribution, from noise that depends on (seed, position) alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from async_rl.generator.sampling import BLOCK, inverse_cdf, sample, uniforms


def chi_square_limit(freedom: int) -> float:
    """Upper 1e-4 quantile of chi-square, by Wilson and Hilferty's approximation."""
    z, share = 3.719, 2 / (9 * freedom)
    return freedom * (1 - share + z * math.sqrt(share)) ** 3


def draws(logits: torch.Tensor, temperature: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` draws from one distribution, each with its own position."""
    position = np.arange(count)
    noise = uniforms(np.full(count, 77, dtype=np.uint64), position)
    rows = logits.repeat(count, 1)
    tokens, log_probs = sample(rows, np.full(count, temperature, dtype=np.float32), noise)
    return tokens.numpy(), log_probs.numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_frequencies_fit_the_tempered_distribution(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    tokens, log_probs = draws(logits, temperature, 20_000)
    expected = torch.softmax(logits / temperature, -1).numpy() * 20_000
    found = np.bincount(tokens, minlength=6)
    assert ((found - expected) ** 2 / expected).sum() < chi_square_limit(5)
    exact = torch.log_softmax(logits / temperature, -1).numpy()
    assert np.allclose(log_probs, exact[tokens], atol=1e-6)


def test_temperature_zero_is_greedy_with_the_log_prob_of_temperature_one():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits.clone(), np.array([0, 1, 0, 0.5, 0], dtype=np.float32), np.full(5, 0.99))
    greedy = [0, 2, 4]
    assert tokens[greedy].tolist() == logits[greedy].argmax(-1).tolist()
    assert torch.allclose(log_probs[greedy], torch.log_softmax(logits, -1)[greedy].amax(-1))


def test_uniforms_are_uniform_and_independent_of_neighbours():
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(100), indexing="ij")
    u = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 100)
    assert ((u >= 0) & (u < 1)).all()
    found = np.histogram(u, bins=50, range=(0, 1))[0]
    assert ((found - 400) ** 2 / 400).sum() < chi_square_limit(49)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[1:, 1:], u[:-1, :-1]), (u[1:, :-1], u[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_uniforms_do_not_depend_on_the_batch():
    seed, position = np.array([5, 9, 5], dtype=np.uint64), np.array([3, 3, 4])
    together = uniforms(seed, position)
    alone = [uniforms(seed[i : i + 1], position[i : i + 1])[0] for i in range(3)]
    assert together.tolist() == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("vocabulary", [4 * BLOCK + 1, 10 * BLOCK, 20_000])
def test_large_vocabularies_give_the_token_of_the_plain_search(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    prob = torch.softmax(3 * torch.randn(64, vocabulary, generator=generator), -1)
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    cumulative = prob.double().cumsum(-1)
    plain = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    assert inverse_cdf(prob, uniform).tolist() == plain.tolist()


@pytest.mark.parametrize("vocabulary", [8, 6 * BLOCK])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary):
    prob = torch.zeros(3, vocabulary)
    prob[:, 2] = 0.25
    prob[:, 5] = 0.75
    uniform = torch.tensor([0.0, 0.25, 1 - 2.0**-52], dtype=torch.float64)
    assert inverse_cdf(prob, uniform).tolist() == [2, 5, 5]
