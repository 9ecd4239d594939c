"""The kernels' segment_ratio is the objective's, for the recipes that it covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.recipe import (
    AdvantageSettings,
    AggregateSettings,
    EssSettings,
    RatioSettings,
    Recipe,
    TrustSettings,
)
from async_rl_kernels import segment_ratio
from async_rl_kernels.segment_ratio import Rule, Turns


def rule_of(recipe: Recipe) -> Rule:
    trust = recipe.trust
    return Rule(
        level=recipe.ratio.level, pool=recipe.ratio.pool, rule=trust.rule, gradient=trust.gradient,
        clip_low=trust.clip_low, clip_high=trust.clip_high, dual_clip=trust.dual_clip, cap=trust.cap, low=trust.low,
        high=trust.high,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("rule", ["none", "ppo", "truncate", "interval", "cispo"])
@pytest.mark.parametrize("gradient", ["unit", "token"])
def test_coefficients_clips_and_ess_equal_the_objectives(
    make_columns: Callable[..., Columns], level: str, pool: str, rule: str, gradient: str
) -> None:
    recipe = Recipe(
        name="compared",
        ratio=RatioSettings(level=level, pool=pool),  # type: ignore[arg-type]
        trust=TrustSettings(rule=rule, gradient=gradient, dual_clip=1.3, cap=1.4),  # type: ignore[arg-type]
        advantage=AdvantageSettings(baseline="none", scale="none"),
        aggregate=AggregateSettings(mode="constant", constant=10.0),
        ess=EssSettings(scale="none", level="sequence", pool="sum"),
    )
    for seed, extreme in ((0, False), (1, False), (2, True)):
        columns = make_columns(seed, extreme=extreme)
        columns = replace(columns, turn_reward=torch.zeros_like(columns.turn_reward))
        want, _ = coefficients(columns, recipe, ObjectiveState())

        lengths = torch.bincount(columns.turn_of_token, minlength=len(columns.trajectory_of_turn))
        turns = torch.bincount(columns.trajectory_of_turn, minlength=len(columns.reward))
        trajectory = columns.trajectory_of_turn[columns.turn_of_token]
        sequences = len(trajectory.unique())
        got = segment_ratio(
            columns.log_prob - columns.log_behaviour,
            columns.reward[trajectory],
            torch.full_like(columns.log_prob, 1 / (10.0 * sequences)),
            Turns(lengths.tolist(), turns.tolist()),
            rule_of(recipe),
        )
        torch.testing.assert_close(got.coefficient, want.policy, rtol=1e-10, atol=1e-12)
        assert want.metrics["clip/frac"] == pytest.approx(float(got.clipped.double().mean()))
        assert want.metrics["ess/size"] == pytest.approx(float(got.log_ess().exp()), rel=1e-9)
