"""Whether a run's rollout plan and its recipe fit each other."""

from __future__ import annotations

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import Recipe

CREDITS = ("path_mean", "segment_gain")
"""kinds of advantage.credit that are about forks"""


def check_rollout(settings: Settings, recipe: Recipe) -> list[str]:
    """Refuse a recipe about forks or a greedy answer where there are none; notes for the user. Raises UserError."""
    if is_own_function(recipe.name):
        return []
    plan, advantage = settings.rollout, recipe.advantage
    if advantage.credit in CREDITS and not plan.roots:
        raise UserError(
            f"recipe {recipe.name}: advantage.credit={advantage.credit} is about answers that fork from one another, "
            "and rollout.roots=0 has every answer begin with the prompt; set rollout.roots"
        )
    if (advantage.baseline == "greedy") != plan.greedy:
        raise UserError(
            f"recipe {recipe.name}: advantage.baseline={advantage.baseline} and rollout.greedy="
            f"{str(plan.greedy).lower()}: a greedy answer is sampled for the baseline of that name; set both "
            "(recipe=remax rollout.greedy=true) or neither"
        )
    if plan.roots and advantage.credit not in CREDITS:
        return [
            f"advantage.credit={advantage.credit} gives a token what its own answer earned, not what its forks did; "
            "path_mean and segment_gain look at them"
        ]
    return []
