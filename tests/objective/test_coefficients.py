"""Identities between recipes, and what no recipe may do whatever it is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import list_recipes, load_recipe
from async_rl.objective.recipe import Recipe, requirements

RECIPES = sorted(list_recipes())


def on_policy(columns: Columns) -> Columns:
    return replace(columns, log_behaviour=columns.log_prob.clone(), log_proximal=columns.log_prob.clone())


def reinforce(recipe: Recipe) -> Recipe:
    """The same advantage and aggregation without ratio and trust rule."""
    return replace(
        recipe,
        ratio=replace(recipe.ratio, level="none"),
        trust=replace(recipe.trust, rule="none"),
        correction=replace(recipe.correction, rule="none"),
        bias=replace(recipe.bias, kappa="none"),
    )


ANOTHER_OBJECTIVE = (
    "a_star_po", "agro", "bpo", "copg", "disco", "gbpo", "gepo", "gvpo", "kimi_k15", "oapl", "ppo_ewma", "real",
    "rebel", "tba",
)  # fmt: skip
"""not REINFORCE even on policy: regressions, discriminations, a target ratio, a ratio that is not 1 there"""


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("clip_cov", "opo", *ANOTHER_OBJECTIVE)])
def test_with_all_ratios_one_every_recipe_is_reinforce_with_its_advantage(
    make_columns: Callable[..., Columns], assert_equal: Callable[..., None], name: str
) -> None:
    without_kl = {"kl": {"coefficient": 0.0}} if name == "see_upo" else {}  # it is not spread over a turn as A is
    recipe = load_recipe({"name": name, **without_kl})
    for seed in range(3):
        columns = on_policy(make_columns(seed))
        got, _ = coefficients(columns, recipe, ObjectiveState())
        want, _ = coefficients(columns, reinforce(recipe), ObjectiveState())
        policy = want.policy
        if recipe.trust.gradient == "unit" and recipe.trust.rule == "ppo":
            policy = spread_over_units(policy, columns, recipe.ratio.level, recipe.ratio.pool)
        if name == "gmpo":
            policy = spread_over_units(policy, columns, "sequence", "mean")
        assert_equal(got.policy, policy)
        if got.baseline is not None:
            assert want.baseline is not None
            assert_equal(got.baseline, want.baseline)
        assert got.metrics["clip/frac"] == 0.0
        assert got.metrics["lr/kappa"] == 1.0
        assert all(factor == pytest.approx(1.0) for factor in got.learning_rate_factors.values())


def spread_over_units(values: Tensor, columns: Columns, level: str, pool: str) -> Tensor:
    """The gradient through a pooled ratio spreads a unit's advantage evenly: its mean, or of a product the sum."""
    if level == "token":
        return values
    unit = columns.turn_of_token
    if level == "sequence":
        unit = columns.trajectory_of_turn[unit]
    result = values.clone()
    for k in unit.unique():
        own = values[unit == k]
        result[unit == k] = own.mean() if pool == "mean" else own.sum()
    return result


def test_one_turn_makes_the_turn_ratio_gspo(make_columns: Callable[..., Columns], assert_equal: Callable) -> None:
    for seed in range(10):
        columns = make_columns(seed, single_turn=True)
        turn = load_recipe({"name": "gspo", "ratio": {"level": "turn"}})
        got, _ = coefficients(columns, turn, ObjectiveState())
        want, _ = coefficients(columns, load_recipe({"name": "gspo"}), ObjectiveState())
        assert_equal(got.policy, want.policy)


def test_one_token_turns_make_turn_ppo_token_ppo(
    make_columns: Callable[..., Columns], assert_equal: Callable[..., None]
) -> None:
    for seed in range(10):
        columns = make_columns(seed, one_token_turns=True)
        got, _ = coefficients(columns, load_recipe({"name": "turn_ppo"}), ObjectiveState())
        token = load_recipe({"name": "turn_ppo", "ratio": {"level": "token"}})
        want, _ = coefficients(columns, token, ObjectiveState())
        assert_equal(got.policy, want.policy)


def test_every_token_of_an_unclipped_turn_gets_the_turn_mean_advantage(make_columns: Callable[..., Columns]) -> None:
    columns = make_columns(0)
    value = columns.value
    assert value is not None
    values = {"name": "turn_ppo", "advantage": {"discount": 0.0, "whiten": False},
              "trust": {"clip_low": 0.99, "clip_high": 1e9}, "aggregate": {"mode": "token_mean"}}  # fmt: skip
    zero = torch.zeros_like
    columns = replace(columns, reward=zero(columns.reward), turn_reward=zero(columns.turn_reward))
    got, _ = coefficients(columns, load_recipe(values), ObjectiveState())
    n = len(columns.log_prob)
    for turn in columns.turn_of_token.unique():
        inside = columns.turn_of_token == turn
        ratio = (columns.log_prob - columns.log_behaviour)[inside].mean().exp()
        want = ratio * (-value[inside]).mean() / n
        torch.testing.assert_close(got.policy[inside], want.expand(int(inside.sum())))


def test_the_turn_ratios_of_the_specification() -> None:
    log_ratio = torch.tensor([0.1, 0.3, -0.2, 0.5, -0.1], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    columns = Columns(
        log_prob=zero - 1, log_behaviour=zero - 1 - log_ratio, version=torch.zeros(5, dtype=torch.int64),
        turn_of_token=torch.tensor([0, 0, 0, 1, 1]), trajectory_of_turn=torch.tensor([0, 0]),
        group_of_trajectory=torch.tensor([0]), reward=torch.ones(1, dtype=torch.float64),
        turn_reward=zero[:2], state_key=torch.tensor([-1, -1]), truncated=torch.tensor([False]),
        current_version=0,
    )  # fmt: skip
    raw = {"baseline": "none", "scale": "none"}
    for level, pool, want in [
        ("turn", "mean", [1.068939] * 3 + [1.221403] * 2),
        ("turn", "sum", [1.221403] * 3 + [1.491825] * 2),
        ("sequence", "mean", [1.127497] * 5),
        ("sequence", "sum", [1.822119] * 5),
    ]:
        recipe = load_recipe({"name": "reinforce_tis", "ratio": {"level": level, "pool": pool},
                              "trust": {"cap": 100.0}, "advantage": raw})  # fmt: skip
        got, _ = coefficients(columns, recipe, ObjectiveState())
        assert (got.policy * 5).tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("r", "a", "high", "want"),
    [(1.5, 1.0, 0.2, 0.0), (0.5, 1.0, 0.2, 0.5), (1.5, -1.0, 0.2, -1.5), (0.5, -1.0, 0.2, 0.0),
     (5.0, -1.0, 0.2, 0.0), (1.25, 1.0, 0.28, 1.25)],
)  # fmt: skip
def test_the_ppo_vectors_of_the_specification(r: float, a: float, high: float, want: float) -> None:
    one = torch.tensor([0])
    zero = torch.zeros(1, dtype=torch.float64)
    columns = Columns(
        log_prob=zero - 2, log_behaviour=zero - 2 - torch.tensor([r], dtype=torch.float64).log(), version=one,
        turn_of_token=one, trajectory_of_turn=one, group_of_trajectory=one, reward=zero + a, turn_reward=zero,
        state_key=one - 1, truncated=one > 0, current_version=0,
    )  # fmt: skip
    trust = {"clip_low": 0.2, "clip_high": high, "dual_clip": 3.0}
    recipe = load_recipe({"name": "grpo", "trust": trust, "advantage": {"baseline": "none", "scale": "none"}})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    assert float(got.policy) == pytest.approx(want)


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10_000), broken=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_broken_numbers_never_reach_coefficients_nor_raise_the_learning_rate(
    make_columns: Callable[..., Columns], name: str, seed: int, broken: float
) -> None:
    columns = make_columns(seed, extreme=True)
    if len(columns.log_prob) == 0:
        return
    log_prob, reward = columns.log_prob.clone(), columns.reward.clone()
    log_prob[len(log_prob) // 2] = broken
    reward[-1] = broken
    columns = replace(columns, log_prob=log_prob, reward=reward)
    got, state = coefficients(columns, load_recipe({"name": name}), ObjectiveState())
    bad = columns.trajectory_of_turn[columns.turn_of_token]
    owner = bad[len(log_prob) // 2]
    for column in (got.policy, got.baseline, got.value_grad, got.clipped, got.entropy):
        if column is not None:
            assert torch.isfinite(column).all()
    for column in (got.policy, got.baseline):
        if column is not None:
            assert not column[(bad == owner) | (bad == len(reward) - 1)].any()
    assert all(0 <= factor <= 1 for factor in got.learning_rate_factors.values())
    assert all(value == value for value in got.metrics.values()), got.metrics
    assert "NaN" not in json.dumps(state.to_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_half_the_precision_gives_the_same_coefficients(make_columns: Callable[..., Columns], name: str) -> None:
    recipe = load_recipe({"name": name})
    columns = make_columns(11)
    single = {f.name: getattr(columns, f.name) for f in fields(columns)}
    single = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in single.items()}
    narrow, _ = coefficients(Columns(**single), recipe, ObjectiveState())
    wide, _ = coefficients(columns, recipe, ObjectiveState())
    assert narrow.policy.dtype == torch.float32
    torch.testing.assert_close(narrow.policy.double(), wide.policy, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "clip_cov"])
def test_the_order_of_groups_does_not_matter(
    make_columns: Callable[..., Columns], assert_equal: Callable[..., None], name: str
) -> None:
    columns = make_columns(12)
    recipe = load_recipe({"name": name})
    got, _ = coefficients(columns, recipe, ObjectiveState())
    turned, back = rotated(columns)
    again, _ = coefficients(turned, recipe, ObjectiveState())
    torch.testing.assert_close(again.policy[back], got.policy, rtol=1e-9, atol=1e-13)
    assert again.learning_rate_factors == pytest.approx(got.learning_rate_factors)


def rotated(columns: Columns) -> tuple[Columns, Tensor]:
    """The last group moved to the front, and where each token went."""
    groups = int(columns.group_of_trajectory[-1]) + 1
    of_trajectory = (columns.group_of_trajectory + 1) % groups
    trajectories = of_trajectory.argsort(stable=True)
    of_turn = trajectories.argsort()[columns.trajectory_of_turn]
    turns = of_turn.argsort(stable=True)
    of_token = turns.argsort()[columns.turn_of_token]
    tokens = of_token.argsort(stable=True)
    order: dict[str, Any] = {"turn_of_token": of_token[tokens], "trajectory_of_turn": of_turn[turns],
             "group_of_trajectory": of_trajectory[trajectories]}  # fmt: skip
    for field in fields(columns):
        value = getattr(columns, field.name)
        if field.name in order or not isinstance(value, Tensor):
            continue
        by = {len(turns): turns, len(trajectories): trajectories, len(tokens): tokens}
        assert len(by) == 3, "the three lengths must differ for this test"
        order[field.name] = value[by[len(value)]]
    return replace(columns, **order), tokens.argsort()


def test_the_chain_through_logits_is_exact(make_columns: Callable[..., Columns]) -> None:
    """Coefficients times grad log pi in logits equals autograd of the whole GRPO loss in logits."""
    columns = make_columns(9)
    n, vocabulary = len(columns.log_prob), 11
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    token = torch.randint(0, vocabulary, (n,), generator=generator)
    log_prob = logits.log_softmax(-1)[torch.arange(n), token]
    noise = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
    columns = replace(columns, log_prob=log_prob.detach(), log_behaviour=(log_prob.detach() - noise))
    recipe = load_recipe({"name": "grpo", "aggregate": {"mode": "token_mean"},
                          "advantage": {"baseline": "none", "scale": "none"}})  # fmt: skip
    got, _ = coefficients(columns, recipe, ObjectiveState())
    (ours,) = torch.autograd.grad(-(got.policy * log_prob).sum(), logits, retain_graph=True)
    a = columns.reward[columns.trajectory_of_turn[columns.turn_of_token]]
    r = (log_prob - columns.log_behaviour).exp()
    (theirs,) = torch.autograd.grad(torch.maximum(-a * r, -a * r.clamp(0.8, 1.2)).mean(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_the_state_survives_a_checkpoint_exactly(make_columns: Callable[..., Columns]) -> None:
    recipe = load_recipe({"name": "vcpo_turn", "ess": {"reference": "calibrated"}})
    _, state = coefficients(make_columns(1), recipe, ObjectiveState())
    assert ObjectiveState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert state != ObjectiveState()


def test_a_missing_column_is_named(make_columns: Callable[..., Columns]) -> None:
    columns = replace(make_columns(1), value=None)
    recipe = load_recipe({"name": "ppo"})
    assert requirements(recipe).value
    with pytest.raises(ValueError, match="needs the column value"):
        coefficients(columns, recipe, ObjectiveState())
