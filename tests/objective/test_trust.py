"""Every trust rule at every level with every credit against autograd of the published surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable
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

LEVELS = [("token", "mean"), ("turn", "mean"), ("turn", "sum"), ("sequence", "mean"), ("sequence", "sum")]
CREDITS = ["trajectory", "turn", "token"]
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "ppo": {"clip_low": 0.2, "clip_high": 0.28},
    "ppo dual": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "truncate": {"cap": 1.3},
    "interval": {"low": 0.7, "high": 1.4},
    "cispo": {"clip_low": 0.3, "clip_high": 0.2},
    "dispo": {"positive_low": 0.2, "positive_high": 0.5, "negative_low": 0.4, "negative_high": 2.0},
    "topr": {"cap": 1.0},
    "damp": {},
}


def with_credit(columns: Columns, credit: str) -> tuple[Columns, Tensor, dict[str, Any]]:
    """Columns and settings under which the advantage of every token is known without any estimator."""
    none = {"baseline": "none", "scale": "none"}
    zero = torch.zeros_like
    if credit == "trajectory":
        advantage = columns.reward[columns.trajectory_of_turn[columns.turn_of_token]]
        return columns, advantage, {"credit": "trajectory", **none}
    if credit == "turn":
        full = torch.bincount(columns.turn_of_token, minlength=len(columns.trajectory_of_turn)) > 0
        columns = replace(columns, reward=zero(columns.reward), turn_reward=columns.turn_reward * full)
        advantage = columns.turn_reward[columns.turn_of_token]
        return columns, advantage, {"credit": "turn_return", "discount": 0.0, **none}
    value = columns.value
    assert value is not None
    columns = replace(columns, reward=zero(columns.reward), turn_reward=zero(columns.turn_reward))
    return columns, -value, {"credit": "token_gae", "discount": 0.0, **none}


def units(columns: Columns, level: str) -> list[list[int]]:
    """Lists of token indices that share one ratio."""
    if level == "token":
        return [[t] for t in range(len(columns.log_prob))]
    owner = columns.turn_of_token
    if level == "sequence":
        owner = columns.trajectory_of_turn[owner]
    found: dict[int, list[int]] = {}
    for token, unit in enumerate(owner.tolist()):
        found.setdefault(unit, []).append(token)
    return list(found.values())


def unit_ratios(log_ratio: Tensor, columns: Columns, level: str, pool: str) -> list[tuple[list[int], Tensor]]:
    """(tokens, exp of the pooled log-ratio clamped to +-20) of every unit."""
    found = []
    for unit in units(columns, level):
        total = log_ratio[unit].sum()
        pooled = total / len(unit) if pool == "mean" else total
        found.append((unit, pooled.clamp(-20.0, 20.0).exp()))
    return found


def token_loss(rule: str, r: Tensor, a: float, log_prob: Tensor, s: dict[str, Any]) -> Tensor:
    """The published loss of one token with its unit's ratio r (docs/algorithms.md#trust)."""
    fixed = r.detach()
    if rule == "none":
        return -a * r
    if rule in ("ppo", "ppo dual"):
        loss = torch.maximum(-a * r, -a * r.clamp(1 - s["clip_low"], 1 + s["clip_high"]))
        if rule == "ppo dual" and a < 0:
            loss = torch.minimum(loss, torch.full_like(loss, -a * s["dual_clip"]))
        return loss
    if rule == "truncate":
        weight = fixed.clamp(max=s["cap"])
    elif rule == "interval":
        weight = fixed if s["low"] <= float(fixed) <= s["high"] else torch.zeros_like(fixed)
    elif rule == "cispo":
        weight = fixed.clamp(1 - s["clip_low"], 1 + s["clip_high"])
    elif rule == "dispo":
        sign = "positive" if a > 0 else "negative"
        weight = fixed.clamp(1 - s[f"{sign}_low"], 1 + s[f"{sign}_high"])
    elif rule == "topr":
        weight = fixed.clamp(0, 1) if a < 0 else torch.ones_like(fixed)
    else:
        weight = (1 / fixed).clamp(max=1.0)
    return -weight * a * log_prob


@pytest.mark.parametrize(("level", "pool"), LEVELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("credit", CREDITS)
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_coefficients_are_the_gradient_of_the_published_surrogate(
    make_columns: Callable[..., Columns],
    descent: Callable[..., Tensor],
    assert_equal: Callable[..., None],
    rule: str,
    credit: str,
    level: str,
    pool: str,
    seed: int,
    extreme: bool,
) -> None:
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme), credit)
    values = RULES[rule]

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        for unit, r in unit_ratios(log_prob - columns.log_behaviour, columns, level, pool):
            for t in unit:
                total = total + token_loss(rule, r, float(advantage[t]), log_prob[t], values)
        return total / len(log_prob)

    recipe = load_recipe(
        {
            "name": "grpo",
            "ratio": {"level": level, "pool": pool},
            "trust": {"rule": rule.split()[0], **values},
            "advantage": chosen,
            "aggregate": {"mode": "token_mean"},
        }
    )
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_gspo_token_is_its_stop_gradient_form(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    seed: int, extreme: bool,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme, spread=0.02), "token")

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        sequences = units(columns, "sequence")
        for unit in sequences:
            log_s = (log_prob[unit] - columns.log_behaviour[unit]).mean().detach().clamp(-20, 20)
            s = (log_prob[unit] - log_prob[unit].detach() + log_s).exp()
            a = advantage[unit]
            clipped = s.clamp(1 - 3e-4, 1 + 4e-4)
            total = total + torch.maximum(-a * s, -a * clipped).mean()
        return total / len(sequences)

    recipe = load_recipe({"name": "gspo_token", "advantage": chosen})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_gmpo_is_the_gradient_of_the_clipped_geometric_mean(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    seed: int, extreme: bool,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme), "token")

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        sequences = units(columns, "sequence")
        for unit in sequences:
            x = log_prob[unit] - columns.log_behaviour[unit]
            sign = advantage[unit].sign()
            y = sign * torch.minimum(sign * x, sign * x.clamp(-0.4, 0.4))
            total = total - advantage[unit].mean() * y.mean().clamp(-20, 20).exp()
        return total / len(sequences)

    recipe = load_recipe({"name": "gmpo", "advantage": chosen})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@pytest.mark.parametrize("divergence", ["probability", "binary_kl"])
@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_dppo_masks_by_probability_and_penalises_the_log_ratio(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    divergence: str, seed: int, extreme: bool,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme, spread=0.8), "trajectory")
    columns = replace(columns, log_behaviour=columns.log_behaviour.clamp(max=-1e-3))  # a probability
    limit = 0.1

    def far(p: float, q: float) -> bool:
        if divergence == "probability":
            return abs(p - q) > limit
        kl = q * (math.log(q) - math.log(p)) if q > 0 else 0.0  # the expectation is over mu, which sampled
        return kl + (1 - q) * (math.log1p(-q) - math.log1p(-p)) > limit

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        for t, x in enumerate(log_prob - columns.log_behaviour):
            p, q = math.exp(columns.log_prob[t]), math.exp(columns.log_behaviour[t])
            a = float(advantage[t])
            drop = far(p, q) and ((a > 0 and p > q) or (a <= 0 and p < q))
            total = total + 1e-3 * x**2
            if not drop:
                total = total - a * x.clamp(-20, 20).exp()
        return total / len(log_prob)

    trust = {"divergence": divergence, "mask_low": limit, "mask_high": limit}
    recipe = load_recipe({"name": "dppo", "advantage": chosen, "trust": trust})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans(), threshold=st.sampled_from([1e-6, 0.04, 0.1, 10.0]))
def test_m2po_all_drops_the_largest_log_ratios_until_the_second_moment_is_small(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    seed: int, extreme: bool, threshold: float,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme), "trajectory")
    square = (columns.log_prob - columns.log_behaviour).square().tolist()
    kept = sorted(range(len(square)), key=lambda t: square[t])
    while len(kept) > 1 and not sum(square[t] for t in kept) / len(kept) < threshold:
        kept.pop()

    def loss(log_prob: Tensor) -> Tensor:
        x = (log_prob - columns.log_behaviour)[kept]
        return -(advantage[kept] * x.clamp(-20, 20).exp()).sum() / max(len(log_prob), 1)

    trust = {"rule": "m2po_all", "second_moment": threshold}
    recipe = load_recipe({"name": "m2po", "advantage": chosen, "trust": trust})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


def _covariance(columns: Columns, advantage: Tensor) -> Tensor:
    return (advantage - advantage.mean()) * (columns.log_prob - columns.log_prob.mean())


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans())
def test_kl_cov_penalises_the_tokens_of_highest_covariance(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    seed: int, extreme: bool,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme), "token")
    number = max(1, int(0.1 * len(columns.log_prob)))
    top = set(_covariance(columns, advantage).argsort(descending=True)[:number].tolist())

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.sum() * 0
        for t, x in enumerate(log_prob - columns.log_behaviour):
            total = total - advantage[t] * x.clamp(-20, 20).exp()
            if t in top:
                total = total + 0.7 * x.abs()
        return total / len(log_prob)

    trust = {"covariance_fraction": 0.1, "covariance_penalty": 0.7}
    recipe = load_recipe({"name": "kl_cov", "advantage": chosen, "trust": trust})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_clip_cov_takes_the_gradient_of_a_few_candidates_and_nothing_else(
    make_columns: Callable[..., Columns], assert_equal: Callable[..., None], seed: int
) -> None:
    columns, advantage, chosen = with_credit(make_columns(seed), "token")
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    plain = load_recipe({"name": "grpo", "advantage": chosen, "aggregate": {"mode": "token_mean"}, "trust": clip})
    trust = {**clip, "covariance_fraction": 0.05, "covariance_low": 0.2, "covariance_high": 3.0}
    recipe = load_recipe({"name": "clip_cov", "advantage": chosen, "trust": trust})
    with_cov = coefficients(columns, recipe, ObjectiveState())[0].policy
    without = coefficients(columns, plain, ObjectiveState())[0].policy
    cov = _covariance(columns, advantage)
    candidates = (without != 0) & (cov > 0.2) & (cov < 3.0)
    changed = with_cov != without
    number = min(int(candidates.sum()), max(1, int(0.05 * len(cov))))
    assert int(changed.sum()) == number
    assert not bool((changed & ~candidates).any())
    assert_equal(with_cov[~changed], without[~changed])
    assert not with_cov[changed].any()
    again = coefficients(columns, recipe, ObjectiveState())[0].policy
    assert torch.equal(again, with_cov)


@pytest.mark.parametrize("correction", ["truncate", "interval"])
@pytest.mark.parametrize(("level", "pool"), [("token", "sum"), ("turn", "sum"), ("sequence", "mean")])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), extreme=st.booleans(), normalise=st.booleans())
def test_decoupled_ppo_weighs_the_clipped_surrogate_back_to_the_behaviour_policy(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    correction: str, level: str, pool: str, seed: int, extreme: bool, normalise: bool,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed, extreme=extreme), "token")
    proximal = columns.log_proximal
    assert proximal is not None
    weight = torch.zeros_like(proximal)
    for unit, v in unit_ratios(proximal - columns.log_behaviour, columns, level, pool):
        if correction == "truncate":
            weight[unit] = v.clamp(max=1.4)
        elif 0.6 <= float(v) <= 1.4:
            weight[unit] = v
    if normalise and weight.mean() > 0:
        weight = weight / weight.mean()

    def loss(log_prob: Tensor) -> Tensor:
        r = (log_prob - proximal).clamp(-20, 20).exp()
        surrogate = torch.maximum(-advantage * r, -advantage * r.clamp(0.8, 1.2))
        return (weight * surrogate).mean()

    recipe = load_recipe(
        {
            "name": "decoupled_ppo",
            "ratio": {"denominator": "proximal"},
            "correction": {
                "rule": correction, "level": level, "pool": pool, "low": 0.6, "high": 1.4,
                "normalise": normalise,
            },
            "advantage": chosen,
        }
    )  # fmt: skip
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


@pytest.mark.parametrize("denominator", ["proximal_loglinear", "mixture", "reference"])
@settings(max_examples=20, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_other_denominators_stand_below_the_ratio(
    make_columns: Callable[..., Columns], descent: Callable[..., Tensor], assert_equal: Callable[..., None],
    denominator: str, seed: int,
) -> None:  # fmt: skip
    columns, advantage, chosen = with_credit(make_columns(seed), "token")
    assert columns.log_reference is not None
    if denominator == "reference":
        below = columns.log_reference
    elif denominator == "mixture":
        below = (0.7 * columns.log_behaviour.exp() + 0.3 * columns.log_prob.exp()).log()
    else:
        now, below = columns.current_version, columns.log_behaviour.clone()
        for t, v in enumerate(columns.version.tolist()):
            share = min(1.0, max(0.0, (now - 1 - v) / (now - v))) if now > v else 0.0
            below[t] += share * (columns.log_prob[t] - columns.log_behaviour[t])

    def loss(log_prob: Tensor) -> Tensor:
        r = (log_prob - below).clamp(-20, 20).exp()
        return torch.maximum(-advantage * r, -advantage * r.clamp(0.8, 1.2)).mean()

    ratio = {"denominator": denominator, "mixture_weight": 0.3}
    recipe = load_recipe({"name": "grpo", "ratio": ratio, "advantage": chosen, "aggregate": {"mode": "token_mean"}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert_equal(got.policy, descent(loss, columns))


def test_cispo_keeps_a_bounded_gradient_where_ppo_has_none(make_columns: Callable[..., Columns]) -> None:
    columns = replace(
        make_columns(0),
        log_prob=torch.tensor([math.log(0.6)], dtype=torch.float64),
        log_behaviour=torch.tensor([math.log(0.4)], dtype=torch.float64),
        version=torch.tensor([7]), turn_of_token=torch.tensor([0]), trajectory_of_turn=torch.tensor([0]),
        group_of_trajectory=torch.tensor([0]), reward=torch.ones(1, dtype=torch.float64),
        turn_reward=torch.zeros(1, dtype=torch.float64), state_key=torch.tensor([-1]),
        truncated=torch.tensor([False]), log_proximal=None, log_reference=None, value=None, entropy=None, median=None,
        log_teacher=None, log_proxy=None, turn_values=None, turn_values_slow=None,
        prob_square_sum=None,
    )  # fmt: skip
    raw = {"baseline": "none", "scale": "none"}

    def coefficient(rule: str) -> float:
        trust = {"rule": rule, "clip_low": 0.2, "clip_high": 0.2}
        recipe = load_recipe({"name": "grpo", "trust": trust, "advantage": raw})
        return float(coefficients(columns, recipe, ObjectiveState())[0].policy)

    assert coefficient("ppo") == 0.0
    assert coefficient("cispo") == pytest.approx(1.2)
    assert coefficient("none") == pytest.approx(1.5)
