"""Whether a run's rollout plan and its recipe fit each other."""

from __future__ import annotations

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import Recipe

CREDITS = ("path_mean", "segment_gain")
"""kinds of advantage.credit that are about forks"""


def check_windows(settings: Settings, recipe: Recipe, *, judges_groups: bool) -> None:
    """Refuse what has no meaning for episodes that are trained in pieces. `judges_groups`: the task does. Raises
    UserError."""
    if not settings.rollout.window:
        if recipe.gae.value_earlier:
            raise UserError(
                f"recipe {recipe.name}: gae.value_earlier is about episodes that are trained in pieces, and "
                "rollout.window=0 has them whole; set rollout.window, or recipe.gae.value_earlier=false"
            )
        return
    if judges_groups:
        raise UserError(f"rollout.window: task '{settings.task.name}' judges whole groups; leave rollout.window out")
    if is_own_function(recipe.name) or recipe.advantage.credit != "token_gae":
        raise UserError(
            f"rollout.window needs a recipe with advantage.credit=token_gae (recipe=t_ppo), which says what a piece is "
            f"worth before its episode is over; recipe {recipe.name} does not"
        )
    whole = {
        "recipe.gae.length_adaptive": recipe.gae.length_adaptive,
        "recipe.reward.overlong_limit": recipe.reward.overlong_limit,
        "recipe.reward.bonus": recipe.reward.bonus,
        "recipe.positive_nll": recipe.positive_nll,
    }
    if asked := [name for name, value in whole.items() if value]:
        raise UserError(
            f"{asked[0]} looks at whole answers, and rollout.window={settings.rollout.window} trains them in pieces; "
            f"set {asked[0]}=0"
        )


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
