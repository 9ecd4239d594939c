"""Numbers that follow a metric, columns that a recipe needs besides, and rules of turns, against plain Python."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_methods import RAW, SUM, answers, batch, of_answer, policy_of
from torch import Tensor

from async_rl.errors import UserError
from async_rl.objective import Coefficients, Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import Schedule, requirements
from async_rl.objective.schedule import value_at
from async_rl.objective.state import Past

SEEDS = range(4)


def descent(columns: Columns, loss: Any) -> Tensor:
    """-d loss / d log pi by autograd, float64. [tokens]"""
    log_prob = columns.log_prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(log_prob), log_prob)
    return -gradient


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


# Distillation.


def taught(columns: Columns, *, missing: bool = False) -> Columns:
    random = torch.Generator().manual_seed(7)
    log_teacher = columns.log_prob + torch.randn(len(columns.log_prob), generator=random, dtype=torch.float64)
    if missing:
        log_teacher[of_answer(columns)[0][0]] = math.nan
    return replace(columns, log_teacher=log_teacher)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_distillation_is_the_importance_weighted_reverse_kl(seed: int) -> None:
    columns = taught(batch(seed))
    log_teacher = columns.log_teacher
    assert log_teacher is not None

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()
        credit = (log_teacher - log_prob).detach()
        return -(ratio * credit).sum() / len(log_prob)

    close(policy_of(columns, "on_policy_distillation"), descent(columns, loss))


def test_the_published_vector_of_distillation() -> None:
    columns = replace(
        answers((1.0,) * 3, (0.0,) * 3),
        log_prob=torch.tensor([-0.1, -2.0, -0.5], dtype=torch.float64),
        log_behaviour=torch.tensor([-0.1, -2.0, -0.5], dtype=torch.float64),
        log_teacher=torch.tensor([-0.2, -0.5, -3.0], dtype=torch.float64),
    )
    got = policy_of(columns, "on_policy_distillation") * 3
    assert got.tolist() == pytest.approx([-0.1, 1.5, -2.5])
    bounded = policy_of(columns, "on_policy_distillation", teaching={"largest": 1.0}) * 3
    assert bounded.tolist() == pytest.approx([-0.1, 1.0, -1.0])


def test_a_teacher_is_added_to_rewards_and_an_answer_without_one_keeps_them() -> None:
    columns = taught(batch(1), missing=True)
    teaching = {"coefficient": 0.5}
    both, alone = policy_of(columns, "grpo", teaching=teaching, trust={"rule": "none"}), taught(batch(1))
    plain = policy_of(columns, "grpo", trust={"rule": "none"})
    changed = both != plain
    assert not changed[of_answer(columns)[0][0]]
    assert int((~changed).sum()) == 1
    left_out = policy_of(columns, "on_policy_distillation")
    assert not left_out[of_answer(columns)[0]].any()
    assert policy_of(alone, "on_policy_distillation")[of_answer(columns)[0]].any()
    with pytest.raises(ValueError, match="needs the column log_teacher"):
        policy_of(batch(1), "on_policy_distillation")


# Lp-Reg.


@pytest.mark.parametrize("seed", SEEDS)
def test_lp_reg_holds_up_improbable_tokens_that_the_proxy_keeps(seed: int) -> None:
    plain = batch(seed, groups=12)
    random = torch.Generator().manual_seed(seed)
    n = len(plain.log_prob)
    log_proxy = plain.log_prob + 0.3 * torch.randn(n, generator=random, dtype=torch.float64)
    log_proxy[torch.rand(n, generator=random) < 0.2] = -math.inf
    columns = replace(plain, log_proxy=log_proxy)
    share = 0.3
    advantage = (
        policy_of(replace(columns, log_behaviour=columns.log_prob), "lp_reg", kl={"coefficient": 0.0, **OFF}) * n
    )
    bound = torch.quantile(columns.log_prob, share)
    chosen = (advantage < 0) & (columns.log_prob <= bound) & (columns.log_prob < log_proxy)
    assert 0 < int(chosen.sum()) < n

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.0, 10.0) * advantage)
        kl = (log_proxy[chosen] - log_prob[chosen]).exp() - (log_proxy[chosen] - log_prob[chosen]) - 1
        return (-surrogate.sum() + kl.sum()) / n

    close(policy_of(columns, "lp_reg", kl={"protected_share": share}), descent(columns, loss))


OFF = {"target": "reference", "tokens": "all"}


def test_the_published_vector_of_lp_reg() -> None:
    columns = replace(
        answers((1.0,) * 2, (-1.0, -1.0)), log_prob=torch.tensor([math.log(0.004), -0.1], dtype=torch.float64),
        log_proxy=torch.tensor([math.log(0.01), -0.05], dtype=torch.float64),
    )  # fmt: skip
    columns = replace(columns, log_behaviour=columns.log_prob)
    got = policy_of(columns, "lp_reg", advantage=RAW, aggregate=SUM, kl={"protected_share": 0.01}) * 2
    assert got.tolist() == pytest.approx([-1 + 1.5, -1.0])
    assert requirements(load_recipe({"name": "lp_reg"})).proxy_share == 0.02
    with pytest.raises(UserError, match="belong together"):
        load_recipe({"name": "lp_reg", "kl": {"tokens": "all"}})


# EPO.


def epo(columns: Columns, state: ObjectiveState, **changes: Any) -> tuple[Coefficients, ObjectiveState]:
    return coefficients(columns, load_recipe({"name": "epo", "schedule": [], **changes}), state)


@pytest.mark.parametrize("seed", SEEDS)
def test_epo_pulls_entropies_back_into_the_band_around_their_past_mean(seed: int) -> None:
    columns = batch(seed)
    assert columns.entropy is not None
    past, weight, bonus = 0.9, 0.3, 0.01
    state = ObjectiveState(entropy=Past(mean=past, updates=5))
    answer, after = epo(columns, state, entropy=bonus, band={"weight": weight}, aggregate={"mode": "token_mean"})
    entropy = columns.entropy.clone().requires_grad_()
    outside = (entropy - 1.2 * past).clamp(min=0) ** 2 + (0.8 * past - entropy).clamp(min=0) ** 2
    (gradient,) = torch.autograd.grad((weight * outside - bonus * entropy).mean(), entropy)
    assert answer.entropy is not None
    close(answer.entropy, -gradient)
    assert after.entropy is not None
    assert after.entropy.updates == 6
    assert after.entropy.mean == pytest.approx((5 * past + float(columns.entropy.mean())) / 6)
    first, _ = epo(columns, ObjectiveState(), entropy=0.0)
    assert first.entropy is None  # nothing is past yet


def test_an_exponential_course_is_the_published_one() -> None:
    moves = Schedule(number="band.weight", start=1.0, end=1 - 0.2 * (1 - math.exp(-2)), until=100,
                     course="exponential", rate=2.0)  # fmt: skip
    for step in (0, 1, 37, 99, 100):
        p = step / 100
        assert value_at(moves, step) == pytest.approx(1 - 0.2 * (1 - math.exp(-2 * p)), rel=1e-12)


# Controllers.


def run(columns: list[Columns], changes: dict[str, Any], *, through_json: bool) -> list[float]:
    """The number after each update; with a checkpoint between all of them, if `through_json`."""
    state, seen = ObjectiveState(), []
    recipe = load_recipe({"name": "grpo", **changes})
    for number, one in enumerate(columns):
        _, state = coefficients(replace(one, current_version=number + 1), recipe, state)
        if through_json:
            state = ObjectiveState.from_dict(json.loads(json.dumps(state.to_dict())))
        seen.append(state.controlled[changes["controller"][0]["number"]].value)
    return seen


def measured(columns: list[Columns], metric: str) -> list[float]:
    return [coefficients(one, load_recipe({"name": "grpo"}), ObjectiveState())[0].metrics[metric] for one in columns]


BATCHES = [batch(seed) for seed in range(5)]


def test_a_number_follows_its_metric_and_a_checkpoint_at_every_step_changes_nothing() -> None:
    entropy = measured(BATCHES, "entropy")
    target = sum(entropy) / len(entropy)
    controller = {"number": "entropy", "metric": "entropy", "target": target, "rate": -0.5, "high": 0.02}
    changes = {"entropy": 0.01, "controller": [controller]}
    value, wanted = 0.01, []
    for now in entropy:
        value = min(0.02, max(0.0, value * math.exp(-0.5 * max(-1, min(1, (now - target) / target)))))
        wanted.append(value)
    found = run(BATCHES, changes, through_json=False)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert found == run(BATCHES, changes, through_json=True)  # bit for bit


def test_a_multiplier_rises_while_its_bound_is_broken_and_is_measured_on_at_zero() -> None:
    controller = {"number": "kl.coefficient", "metric": "kl/regulariser", "target": 0.5, "law": "add", "rate": 1.0}
    kl = {"coefficient": 0.1, "target": "behaviour", "estimator": "chi2"}
    fresh = [replace(one, log_behaviour=one.log_prob) for one in BATCHES]
    down = run(fresh[:2], {"kl": kl, "controller": [controller]}, through_json=True)
    assert down == [0.0, 0.0]
    stale = [*fresh[:2], *BATCHES[2:4]]
    up = run(stale, {"kl": kl, "controller": [{**controller, "target": 0.01}]}, through_json=False)
    assert 0.0 < up[2] < up[3]


@pytest.mark.parametrize("seed", SEEDS)
def test_r2vpo_is_the_lagrangian_of_a_bounded_second_moment(seed: int) -> None:
    columns = batch(seed)
    n, multiplier = len(columns.log_prob), 1.0
    advantage = policy_of(replace(columns, log_behaviour=columns.log_prob), "r2vpo", controller=[],
                          kl={"coefficient": 0.0}) * n  # fmt: skip

    def loss(log_prob: Tensor) -> Tensor:
        ratio = (log_prob - columns.log_behaviour).exp()
        return (-(ratio * advantage) + multiplier * (ratio - 1) ** 2).sum() / n

    close(policy_of(columns, "r2vpo"), descent(columns, loss))


def test_a_switch_acts_once_and_for_good() -> None:
    rewards = [0.0, 1.0, 1.0, 0.0]
    columns = [replace(one, reward=torch.full_like(one.reward, r)) for one, r in zip(BATCHES, rewards, strict=False)]
    controller = {"number": "trust.clip_high", "metric": "reward/mean", "target": 0.5, "law": "switch", "then": 0.4,
                  "hold": 2}  # fmt: skip
    assert run(columns, {"controller": [controller]}, through_json=True) == [0.2, 0.2, 0.4, 0.4]


@pytest.mark.parametrize(
    ("controller", "said"),
    [({"number": "trust.seed"}, "no number of the recipe"), ({"number": "entropy", "metric": "speed"}, "metric is"),
     ({"number": "entropy", "target": 1.0}, "first value other than 0"),
     ({"number": "trust.clip_high", "target": 1.0, "low": 0.5}, "must lie between"),
     ({"number": "trust.clip_high", "law": "switch", "then": 0.2}, "do nothing")],
)  # fmt: skip
def test_controllers_that_could_not_move_anything_are_refused(controller: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe({"name": "grpo", "controller": [controller]})


# Turns compared otherwise.


def turns(rewards: list[list[float]], agents: list[list[int]] | None = None) -> Columns:
    """One group; a turn is one token; the last one's reward is the outcome."""
    n = sum(map(len, rewards))
    owner = torch.arange(len(rewards)).repeat_interleave(torch.tensor([len(r) for r in rewards]))
    log_prob = torch.full((n,), -0.7, dtype=torch.float64)
    return replace(
        batch(0, groups=1, size=2), log_prob=log_prob, log_behaviour=log_prob, entropy=log_prob,
        log_reference=None, value=None, version=torch.zeros(n, dtype=torch.int64), turn_of_token=torch.arange(n),
        trajectory_of_turn=owner, group_of_trajectory=torch.zeros(len(rewards), dtype=torch.int64),
        reward=torch.tensor([r[-1] for r in rewards], dtype=torch.float64),
        turn_reward=torch.tensor([v for r in rewards for v in (*r[:-1], 0.0)], dtype=torch.float64),
        state_key=torch.full((n,), -1), truncated=torch.zeros(len(rewards), dtype=torch.bool),
        agent_of_turn=None if agents is None else torch.tensor([a for row in agents for a in row]),
        agents=("",) if agents is None else ("black", "white"),
    )  # fmt: skip


def test_igpo_standardises_the_groups_turn_rewards_and_then_sums_them() -> None:
    rewards = [[0.15, -0.05, 1.0], [0.1, 0.0]]
    every = [v for row in rewards for v in row]
    mean = sum(every) / 5
    std = math.sqrt(sum((v - mean) ** 2 for v in every) / 4) + 1e-6
    wanted = [sum((v - mean) / std for v in row[k:]) for row in rewards for k in range(len(row))]
    got = policy_of(turns(rewards), "igpo") * 5
    assert got.tolist() == pytest.approx(wanted, rel=1e-9)


def test_mars_takes_off_the_mean_of_the_distinct_returns_of_an_agent() -> None:
    rewards = [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 3.0]]
    columns = turns(rewards, [[0, 1, 0, 1]] * 3)
    got = policy_of(columns, "mars", advantage={"whiten": False}) * 12
    # an episode's outcome is each agent's: black returns 2, 2, then 3, 3 twice; white 1, 1, then 3, 3 twice
    black, white = (2 + 3) / 2, (1 + 3) / 2
    first, other = [2 - black, 1 - white], [3 - black, 3 - white]
    assert got.tolist() == pytest.approx([*first, *first, *other, *other, *other, *other])
