"""Recipes as files: found, loaded, laid over, explained; idle or contradictory ones refused."""

from __future__ import annotations

from typing import Any

import pytest

from async_rl.errors import UserError
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import explain, list_recipes, load_recipe
from async_rl.objective.recipe import requirements

SETUP: dict[str, Any] = {
    "group_size": 8,
    "updates_per_batch": 1,
    "max_staleness": 4,
    "has_critic": True,
    "single_turn": False,
}
EXPECTED = [
    "grpo", "dr_grpo", "rloo", "reinforce_tis", "reinforce_pp", "reinforce_pp_baseline", "opo", "max_rl",
    "ngrpo", "gigpo", "turn_grpo", "ppo", "s_ppo", "turn_ppo", "st_ppo", "so_grpo", "gspo", "gspo_token",
    "gmpo", "cispo", "dispo", "topr", "tis", "mis", "icepop", "opsm", "m2po", "dppo", "clip_cov", "kl_cov",
    "delay_damped", "vcpo", "vcpo_turn", "vcpo_token", "ess_grpo",
]  # fmt: skip


def test_every_promised_recipe_is_there_with_a_description() -> None:
    listed = list_recipes()
    assert set(EXPECTED) <= set(listed)
    assert all(len(text) > 20 for text in listed.values())


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_loads_has_an_effect_and_explains_every_choice(name: str) -> None:
    recipe = load_recipe({"name": name})
    updates = 2 if recipe.trust.rule == "mix_ppo" else 1
    check_effect(recipe, **{**SETUP, "updates_per_batch": updates})
    text = explain(recipe)
    assert text.startswith(name)
    for section in ("ratio", "trust", "select", "advantage", "kl", "aggregate", "ess", "bias"):
        assert f"\n{section}\n" in text
    assert "override" not in text


def test_values_are_laid_over_the_file_and_shown_as_overrides() -> None:
    recipe = load_recipe({"name": "vcpo", "ess": {"reference": 0.55}, "opob": {"norm": "length"}, "entropy": 0.01})
    assert recipe.ess.reference == 0.55
    assert recipe.ess.scale == "sqrt"
    assert recipe.trust.cap == 8.0
    text = explain(recipe)
    assert "reference = 0.55  [override (recipe: calibrated)]" in text
    assert "entropy = 0.01  [override (recipe: 0.0)]" in text
    assert "pool = sum  [recipe: product over all policy tokens of the trajectory]" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "vcop"}, "did you mean 'vcpo'"),
        ({}, "is not a recipe"),
        ({"name": "vcpo", "trust": {"cpa": 1}}, "recipe.trust.cpa is not a setting; did you mean 'recipe.trust.cap'"),
        ({"name": "vcpo", "trust": {"rule": "clip"}}, "recipe.trust.rule"),
        ({"name": "vcpo", "ess": {"reference": "calibrate"}}, "a number or calibrated"),
        ({"name": "grpo", "ratio": {"level": "none"}}, "1 by construction"),
        ({"name": "vcpo", "trust": {"rule": "none"}, "bias": {"kappa": "guarded"}}, "cuts nothing"),
        ({"name": "vcpo", "select": {"sequence_high": 2.0}}, "the truncation never acts"),
        ({"name": "grpo", "trust": {"dual_clip": 1.1}}, "dual_clip"),
        ({"name": "grpo", "correction": {"rule": "truncate"}}, "counted twice"),
        ({"name": "grpo", "advantage": {"baseline": "opob"}}, "advantage's sign"),
        ({"name": "grpo", "kl": {"coefficient": 0.1, "estimator": "k1"}}, "zero expected gradient"),
        ({"name": "vcpo", "kl": {"coefficient": 0.1}}, "opob.norm=logit or length"),
        ({"name": "vcpo", "entropy": 0.01}, "opob.norm=logit or length"),
        ({"name": "vcpo_turn", "opob": {"weight": "paper"}}, "one weight per trajectory"),
        (
            {"name": "tis", "ratio": {"denominator": "mixture"}, "trust": {"cap": 2.0}},
            "bounds the ratio by 1 / mixture_weight = 2",
        ),
        ({"name": "icepop", "trust": {"low": 1.1}}, "does not contain 1"),
        ({"name": "mis", "select": {"geometric_high": 0.9}}, "does not contain 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_load_with_the_reason(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(values)


@pytest.mark.parametrize(
    ("values", "setup", "message"),
    [
        ({"name": "grpo", "ratio": {"denominator": "proximal"}}, {}, "every ratio 1 by construction"),
        ({"name": "vcpo"}, {"group_size": 1}, "makes every advantage 0"),
        ({"name": "rloo"}, {"group_size": 1}, "makes every advantage 0"),
        ({"name": "st_ppo"}, {"has_critic": False}, "needs a critic"),
        (
            {"name": "grpo", "kl": {"coefficient": 0.1, "target": "proximal"}},
            {},
            "kl.target=proximal with one update",
        ),
    ],
)
def test_what_does_nothing_in_the_set_up_is_refused_with_the_reason(
    values: dict[str, Any], setup: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_effect(load_recipe(values), **{**SETUP, **setup})


def test_the_proximal_denominator_is_allowed_with_several_updates() -> None:
    recipe = load_recipe({"name": "grpo", "ratio": {"denominator": "proximal"}})
    check_effect(recipe, **{**SETUP, "updates_per_batch": 4})


def test_what_is_idle_but_harmless_is_said() -> None:
    fresh = {**SETUP, "max_staleness": 0}
    assert any("ratio is 1" in note for note in check_effect(load_recipe({"name": "grpo"}), **fresh))
    single = {**SETUP, "single_turn": True}
    notes = check_effect(load_recipe({"name": "so_grpo"}), **single)
    assert any("turn ratio is the sequence ratio" in note for note in notes)
    assert any("does not correct for stale" in note for note in check_effect(load_recipe({"name": "opo"}), **SETUP))


def test_only_what_a_recipe_needs_is_asked_for() -> None:
    def needs(**values: Any) -> set[str]:
        need = requirements(load_recipe(values))
        return {name for name in need.__slots__ if getattr(need, name)}

    assert needs(name="grpo") == set()
    assert needs(name="vcpo") == {"per_trajectory_norms"}
    assert needs(name="vcpo", opob={"norm": "logit"}) == {"prob_square_sum"}
    assert needs(name="st_ppo") == {"value"}
    assert needs(name="st_ppo", bias={"estimator": "exact"}) == {"value", "clipping_bias_norm"}
    assert needs(name="grpo", kl={"coefficient": 0.1}, entropy=0.1) == {"reference", "entropy"}
    assert needs(name="grpo", ratio={"denominator": "proximal"}) == {"proximal"}
