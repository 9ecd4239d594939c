"""Rules restated from their papers, token by token in plain Python, against the coefficients of the recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

RAW = {"credit": "trajectory", "baseline": "none", "scale": "none", "whiten": False}
"""the advantage of a token is the reward of its answer"""


def answers(
    log_prob: Sequence[float], log_behaviour: Sequence[float], reward: Sequence[float], length: Sequence[int]
) -> Columns:
    """Columns of answers of one turn each in one group: log-probs of tokens, rewards and lengths of answers."""
    owner = [i for i, tokens in enumerate(length) for _ in range(tokens)]
    return Columns(
        log_prob=torch.tensor(log_prob, dtype=torch.float64),
        log_behaviour=torch.tensor(log_behaviour, dtype=torch.float64),
        version=torch.zeros(len(owner), dtype=torch.int64),
        turn_of_token=torch.tensor(owner, dtype=torch.int64),
        trajectory_of_turn=torch.arange(len(length)),
        group_of_trajectory=torch.zeros(len(length), dtype=torch.int64),
        reward=torch.tensor(reward, dtype=torch.float64),
        turn_reward=torch.zeros(len(length), dtype=torch.float64),
        state_key=torch.full((len(length),), -1),
        truncated=torch.zeros(len(length), dtype=torch.bool),
        current_version=1,
        value=torch.zeros(len(owner), dtype=torch.float64),
    )


def policy_of(columns: Columns, name: str, **changes: Any) -> Tensor:
    """The `policy` column [tokens] of recipe `name` with changes."""
    return coefficients(columns, load_recipe({"name": name, **changes}), ObjectiveState())[0].policy


# DPPO, Eq. 14: tokens are masked by D(mu || pi) of "this token or another", the expectation under mu, which sampled.


@pytest.mark.parametrize(
    ("mu", "pi", "threshold", "masked"),
    [(0.05, 0.40, 0.4, False), (0.05, 0.40, 0.3, True), (0.40, 0.02, 0.6, True), (0.40, 0.02, 1.0, False)],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dppo_masks_by_the_divergence_from_the_policy_that_sampled(
    mu: float, pi: float, threshold: float, masked: bool, advantage: float
) -> None:
    sampled, other = (mu, 1 - mu), (pi, 1 - pi)
    divergence = sum(m * math.log(m / p) for m, p in zip(sampled, other, strict=True))
    assert (divergence > threshold) == masked
    away = (pi > mu) == (advantage > 0)  # only a move in the advantage's direction is masked
    trust = {"divergence": "binary_kl", "mask_low": threshold, "mask_high": threshold}
    columns = answers([math.log(pi)], [math.log(mu)], [advantage], [1])
    got = policy_of(columns, "dppo", trust=trust, advantage=RAW, kl={"coefficient": 0.0})
    assert got.tolist() == pytest.approx([0.0 if masked and away else advantage * pi / mu])


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    mu=st.floats(1e-6, 1 - 1e-6), pi=st.floats(1e-6, 1 - 1e-6), low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0),
    advantage=st.sampled_from([1.0, -1.0]),
)  # fmt: skip
def test_dppo_masks_a_token_of_any_probability_as_published(
    mu: float, pi: float, low: float, high: float, advantage: float
) -> None:
    sampled = torch.distributions.Bernoulli(torch.tensor(mu, dtype=torch.float64))
    now = torch.distributions.Bernoulli(torch.tensor(pi, dtype=torch.float64))
    divergence = float(torch.distributions.kl_divergence(sampled, now))
    if min(abs(divergence - low), abs(divergence - high)) < 1e-9:
        return  # on the threshold rounding decides
    masked = divergence > (high if advantage > 0 else low) and (pi > mu) == (advantage > 0)
    trust = {"divergence": "binary_kl", "mask_low": low, "mask_high": high}
    columns = answers([math.log(pi)], [math.log(mu)], [advantage], [1])
    got = policy_of(columns, "dppo", trust=trust, advantage=RAW, kl={"coefficient": 0.0})
    assert bool(got == 0) == masked


@pytest.mark.parametrize(("log_mu", "log_pi"), [(-1000.0, -1e-9), (-1e-9, -1000.0), (-1e-17, -1000.0), (0.0, -0.5)])
def test_dppo_masks_where_a_probability_is_0_or_1_in_float64(log_mu: float, log_pi: float) -> None:
    """KL(mu || pi) is log(1 / (1 - pi)), or nearly -log pi: finite, and large."""
    trust = {"divergence": "binary_kl", "mask_low": 0.4, "mask_high": 0.4}
    away = 1.0 if log_pi > log_mu else -1.0
    columns = answers([log_pi], [log_mu], [away], [1])
    assert policy_of(columns, "dppo", trust=trust, advantage=RAW, kl={"coefficient": 0.0}).tolist() == [0.0]
    columns = answers([log_pi], [log_mu], [-away], [1])
    assert policy_of(columns, "dppo", trust=trust, advantage=RAW, kl={"coefficient": 0.0}).isfinite().all()


# M2PO, Algorithm 1: among the tokens whose update would move the ratio further from 1, the largest squared log-ratio is
# masked until the mean of those that are left does not exceed the threshold. No other token is ever masked.


def algorithm_1(log_ratio: list[float], advantage: list[float], threshold: float) -> list[bool]:
    """The mask M: which tokens stay."""
    stays = [True] * len(log_ratio)
    region = {
        i for i, (x, a) in enumerate(zip(log_ratio, advantage, strict=True)) if (a > 0 and x > 0) or (a < 0 and x < 0)
    }
    while region and math.fsum(log_ratio[i] ** 2 for i in region) / len(region) > threshold:
        worst = max(region, key=lambda i: log_ratio[i] ** 2)
        stays[worst] = False
        region.remove(worst)
    return stays


@pytest.mark.parametrize("credit", ["answer", "token"])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000), spread=st.sampled_from([0.05, 0.3, 1.0]), extreme=st.booleans(),
    threshold=st.sampled_from([1e-6, 0.01, 0.04, 0.3, 10.0]),
)  # fmt: skip
def test_m2po_is_algorithm_1_token_for_token(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    credit: str, seed: int, spread: float, extreme: bool, threshold: float,
) -> None:  # fmt: skip
    columns = make_columns(seed, spread=spread, extreme=extreme)
    settled = torch.rand(len(columns.reward), generator=torch.Generator().manual_seed(seed)) < 0.2
    columns = replace(columns, reward=columns.reward.masked_fill(settled, 0.0))  # A = 0: in no trust region
    chosen: dict[str, Any] = dict(RAW)
    advantage = columns.reward[columns.trajectory_of_turn[columns.turn_of_token]]
    if credit == "token":  # a sign of its own for every token
        zero = torch.zeros_like
        columns = replace(columns, reward=zero(columns.reward), turn_reward=zero(columns.turn_reward))
        assert columns.value is not None
        chosen, advantage = RAW | {"credit": "token_gae", "discount": 0.0}, -columns.value
    log_ratio = (columns.log_prob - columns.log_behaviour).tolist()
    stays = torch.tensor(algorithm_1(log_ratio, advantage.tolist(), threshold))

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).clamp(-20, 20).exp()
        return -(stays * advantage * ratio).sum() / len(ratio)

    got = policy_of(columns, "m2po", advantage=chosen, trust={"second_moment": threshold})
    assert_equal(got, descent(loss, columns))


def test_m2po_keeps_a_token_that_the_update_pulls_back_and_may_mask_all_others() -> None:
    log_ratio = [3.0, 0.5, 0.5, -0.7, 0.0]
    advantage = [-1.0, 1.0, 1.0, -1.0, 1.0]
    columns = answers([-1.0] * 5, [-1.0 - x for x in log_ratio], advantage, [1] * 5)
    masked = policy_of(columns, "m2po", advantage=RAW, trust={"second_moment": 0.2}) == 0
    assert masked.tolist() == [False, True, True, True, False]
    masked = policy_of(columns, "m2po", advantage=RAW, trust={"second_moment": 0.25}) == 0  # reached, not exceeded
    assert masked.tolist() == [False, False, False, True, False]
    with_all = {"rule": "m2po_all", "second_moment": 0.25}
    assert bool(policy_of(columns, "m2po", advantage=RAW, trust=with_all)[0] == 0)


# VAPO, the loss L_NLL: minus the mean of log pi over all tokens of the correct answers, with weight mu.


def with_and_without_nll(columns: Columns, **changes: Any) -> tuple[Tensor, Tensor]:
    """The `policy` columns of vapo with mu = 0.1, and with mu = 0."""
    whole = policy_of(columns, "vapo", **changes)
    return whole, policy_of(columns, "vapo", positive_nll=0.0, **changes)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10_000), wrong=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    mode=st.sampled_from(["token_mean", "seq_mean_token_mean", "constant"]), broken=st.booleans(),
)  # fmt: skip
def test_vapo_adds_the_mean_over_the_tokens_of_correct_answers(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor],
    seed: int, wrong: float, mode: str, broken: bool,
) -> None:  # fmt: skip
    columns = make_columns(seed)
    random = torch.Generator().manual_seed(seed)
    reward = (torch.rand(len(columns.reward), generator=random) >= wrong).double() * 2 - 1
    if broken:  # a trajectory that is rejected is no correct answer
        reward[0] = torch.nan
    columns = replace(columns, reward=reward)
    owner = columns.trajectory_of_turn[columns.turn_of_token].tolist()
    correct = [t for t, i in enumerate(owner) if float(reward[i]) > 0]

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        for t in correct:
            total = total - log_prob[t]
        return 0.1 * total / max(len(correct), 1)

    whole, without = with_and_without_nll(columns, aggregate={"mode": mode})
    torch.testing.assert_close(whole - without, descent(loss, columns), rtol=1e-9, atol=1e-13)
    assert float((whole - without).sum()) == pytest.approx(0.1 if correct else 0.0)


@pytest.mark.parametrize("correct", [0, 1, 8, 16])
def test_vapo_weighs_correct_answers_alike_however_few_they_are(correct: int) -> None:
    rewards = [1.0] * correct + [0.0] * (16 - correct)
    columns = answers([-1.0] * 160, [-1.0] * 160, rewards, [10] * 16)
    whole, without = with_and_without_nll(columns)
    assert float((whole - without).sum()) == pytest.approx(0.1 if correct else 0.0)
    assert not (whole - without)[10 * correct :].any()


def test_vapo_has_no_imitation_of_an_answer_that_selection_left_out() -> None:
    columns = answers([-1.0] * 6, [-1.0] * 2 + [-9.0] * 4, [1.0, 1.0], [2, 4])
    whole, without = with_and_without_nll(columns, select={"geometric_high": 2.0})
    assert (whole - without).tolist() == pytest.approx([0.05, 0.05, 0, 0, 0, 0])
