"""What is done to rewards and advantages around the trust rule, what is left out, and numbers that move with a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_methods import RAW, SUM, answers, batch, of_answer, of_group, policy_of, spread

from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.conflicts import check_effect
from async_rl.objective.gates import highest
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.objective.tokens import Noted

WIDE = {"clip_low": 0.999, "clip_high": 1e9}


def test_dapo_punishes_answers_near_the_limit_and_selects_by_the_reward_without_it() -> None:
    """The vector of the source, in units of 1024 tokens: 16384, 18432 and 20480 of 20480."""
    owner = torch.arange(3).repeat_interleave(torch.tensor([16, 18, 20]))
    n = len(owner)
    log_prob = torch.full((n,), -0.7, dtype=torch.float64)
    columns = replace(
        answers((1.0,) * 3, (1.0, 1.0, 0.0)), turn_of_token=owner, version=torch.zeros(n, dtype=torch.int64),
        log_prob=log_prob, log_behaviour=log_prob, entropy=log_prob, value=None,
    )  # fmt: skip
    changes: dict[str, Any] = {
        "reward": {"overlong_limit": 20, "overlong_buffer": 4}, "advantage": RAW, "aggregate": SUM,
        "select": {"drop_equal_rewards": False},
    }  # fmt: skip
    got = policy_of(columns, "dapo", **changes) * 3
    assert [float(got[owner == i][0]) for i in range(3)] == pytest.approx([1.0, 0.5, -1.0])
    equal = replace(columns, reward=torch.ones(3, dtype=torch.float64))
    changes["select"] = {"drop_equal_rewards": True}
    answer, _ = coefficients(equal, load_recipe({"name": "dapo", **changes}), ObjectiveState())
    assert answer.skip  # equal as the task gave them, though the penalty tells them apart
    assert answer.metrics["reject/equal_rewards/trajectories"] == 3


@pytest.mark.parametrize("level", ["trajectory", "turn", "token"])
def test_a_trajectory_with_a_void_turn_is_left_out_and_its_reward_still_counts(level: str) -> None:
    columns = batch(0, groups=1)
    void = torch.tensor([math.nan, 0.0, 1.0, math.nan])
    noted = {
        "trajectory": Noted(trajectory={"void": void}),
        "turn": Noted(turn={"void": void}),
        "token": Noted(token={"void": spread(columns, void)}),
    }[level]
    got, whole = policy_of(replace(columns, noted=noted), "simple_tir"), policy_of(columns, "simple_tir")
    out = spread(columns, torch.arange(4)) == 2
    assert bool(out.any())
    assert not got[out].any()
    torch.testing.assert_close(got[~out], whole[~out])


def test_cppo_keeps_the_largest_advantages_of_the_batch() -> None:
    reward = torch.tensor([1.0, 0, 0, 1, 0.6, 0.5, 0.4, 0.5], dtype=torch.float64)
    columns = replace(batch(3, groups=2), reward=reward)
    got = policy_of(columns, "cppo", advantage={"scale": "none"}, trust=WIDE)
    assert [bool(got[tokens].any()) for tokens in of_answer(columns)] == [True] * 4 + [False] * 4


def test_groups_outside_the_band_are_left_out() -> None:
    reward = [1.0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    columns = replace(batch(0, groups=4), reward=torch.tensor(reward, dtype=torch.float64))
    got = policy_of(columns, "balanced_grpo", trust=WIDE, advantage={"baseline": "none", "scale": "none"})
    trained = [any(bool(got[of_answer(columns)[i]].any()) for i in members) for members in of_group(columns)]
    assert trained == [False, True, True, False]


def test_empg_scales_turns_by_their_entropy() -> None:
    """H scaled (0, .5, 1) with k = 1: factors 1.519441, .921588, .558971; bonuses of the next turn."""
    columns = replace(
        answers((1.0,) * 3, (1.0, 0.0, 0.0)), trajectory_of_turn=torch.zeros(3, dtype=torch.int64),
        group_of_trajectory=torch.tensor([0]), reward=torch.ones(1, dtype=torch.float64),
        truncated=torch.tensor([False]), entropy=torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64),
    )  # fmt: skip
    changes: dict[str, Any] = {"advantage": RAW, "aggregate": SUM}
    got = policy_of(columns, "empg", shape={"turn_entropy": 1.0, "clarity": 0.0}, **changes)
    assert got.tolist() == pytest.approx([1.519441, 0.921588, 0.558971], abs=5e-7)
    got = policy_of(columns, "empg", shape={"turn_entropy": 1.0, "clarity": 0.1}, **changes)
    moved = torch.tensor([1.519441 + 0.0606531, 0.921588 + 0.0367879, 0.558971], dtype=torch.float64)
    torch.testing.assert_close(got, moved - moved.mean(), atol=1e-6, rtol=0)


def test_a_mask_of_turns_takes_whole_turns(make_columns: Callable[..., Columns]) -> None:
    for seed in range(5):
        columns = make_columns(seed)
        got = policy_of(columns, "entropy_turns", mask={"turn_entropy_share": 0.5}, advantage=RAW)
        used = [got[columns.turn_of_token == turn] != 0 for turn in columns.turn_of_token.unique()]
        assert all(bool(one.all()) or not bool(one.any()) for one in used)
        assert 0.35 < sum(bool(one.all()) for one in used) / len(used) < 0.65


@pytest.mark.parametrize("changes", [{"mask": {"entropy_share": 0.5}}, {"shape": {"focal": 0.5}}])
def test_masks_and_factors_stand_in_the_column_of_an_exact_baseline(
    make_columns: Callable[..., Columns], changes: dict[str, Any]
) -> None:
    """What multiplies the reward and what multiplies the baseline keep their ratio on every token."""
    columns = make_columns(4)
    plain, _ = coefficients(columns, load_recipe({"name": "vcpo"}), ObjectiveState())
    masked, _ = coefficients(columns, load_recipe({"name": "vcpo", **changes}), ObjectiveState())
    assert plain.baseline is not None
    assert masked.baseline is not None
    there = (plain.baseline != 0) & (masked.baseline != 0)
    torch.testing.assert_close((masked.policy / masked.baseline)[there], (plain.policy / plain.baseline)[there])
    assert not torch.equal(masked.policy, plain.policy)


@pytest.mark.parametrize("course", ["linear", "jump"])
@pytest.mark.parametrize(
    ("step", "linear", "jump"), [(0, 0.1, 0.1), (10, 0.1, 0.1), (20, 0.075, 0.1), (50, 0.0, 0.0), (99, 0.0, 0.0)]
)
def test_a_number_moves_with_the_step(step: int, linear: float, jump: float, course: str) -> None:
    moves = [{"number": "kl.coefficient", "start": 0.1, "end": 0.0, "since": 10, "until": 50, "course": course}]
    recipe = load_recipe({"name": "grpo", "schedule": moves})
    assert requirements(recipe).reference
    columns = replace(batch(0), current_version=step)
    got, _ = coefficients(columns, recipe, ObjectiveState())
    fixed = load_recipe({"name": "grpo", "kl": {"coefficient": linear if course == "linear" else jump}})
    torch.testing.assert_close(got.policy, coefficients(columns, fixed, ObjectiveState())[0].policy)


def test_several_kls_add_up() -> None:
    columns = batch(0)
    second = {"coefficient": 0.2, "target": "behaviour", "estimator": "k2"}
    plain = policy_of(columns, "grpo")
    one = policy_of(columns, "grpo", kl={"coefficient": 0.1}) - plain
    other = policy_of(columns, "grpo", kl=second) - plain
    both = policy_of(columns, "grpo", kl={"coefficient": 0.1}, more_kl=[second])
    torch.testing.assert_close(both, plain + one + other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "gvpo", "ratio": {"level": "token"}}, "needs ratio.level=sequence"),
        ({"name": "vcpo", "mask": {"advantage_sigma": 3.0}}, "finds only afterwards"),
        ({"name": "grpo", "reward": {"threshold": 0.5}}, "reward.outcome=indicator"),
        ({"name": "gdpo", "reward": {"overlong_limit": 9000}}, "does not look at"),
        ({"name": "grpo", "advantage": {"baseline": "noted", "scale": "none"}}, "advantage.note"),
        ({"name": "grpo", "schedule": [{"number": "trust.rule", "end": 1, "until": 3}]}, "no number of the recipe"),
        ({"name": "grpo", "schedule": [{"number": "entropy", "end": 1.0}]}, "must lie behind"),
        ({"name": "grpo", "more_kl": [{"coefficient": 0.0}]}, "does nothing"),
        ({"name": "grpo", "more_kl": {"coefficient": 0.1}}, "must be a list"),
        ({"name": "disco", "aggregate": {"mode": "token_mean"}}, "its own denominators"),
        ({"name": "bapo", "trust": {"low_end": 1.2}}, "low_start <= low_end"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(values)


def test_names_that_the_task_does_not_give_are_refused() -> None:
    setup: dict[str, Any] = {
        "group_size": 8, "updates_per_batch": 1, "max_staleness": 4, "has_critic": False, "single_turn": False,
    }  # fmt: skip
    recipe = load_recipe({"name": "simple_tir"})
    check_effect(recipe, **setup)
    check_effect(recipe, **setup, noted=["void"])
    with pytest.raises(UserError, match="did you mean 'vodi'"):
        check_effect(recipe, **setup, noted=["vodi"])
    with pytest.raises(UserError, match="plain number"):
        check_effect(load_recipe({"name": "gdpo"}), **setup, parts=())


@pytest.mark.parametrize("lengths", [[3, 0, 5, 4, 1], [1, 1, 200, 2, 1, 1], []], ids=["alike", "one very long", "none"])
def test_the_highest_of_each_segment_are_found_whatever_their_lengths(lengths: list[int]) -> None:
    values = torch.randint(0, 4, (sum(lengths),), generator=torch.Generator().manual_seed(0)).double()
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    wanted: list[bool] = []
    for part in values.split(lengths):
        first = sorted(range(len(part)), key=lambda t: (-float(part[t]), t))[: math.ceil(0.3 * len(part) - 1e-9)]
        wanted += [t in first for t in range(len(part))]
    assert highest(values, segment, len(lengths), 0.3).tolist() == wanted
