"""Settings that act only beside others: refused where they would do nothing, with the one that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from async_rl.objective.recipe import Recipe, kl_terms, moving_numbers
from async_rl.objective.schedule import scheduled

Acts = Callable[[Recipe], bool]

LENGTHS_TO_TARGET = ("target", "target_max", "within")
NEEDS: tuple[tuple[tuple[str, ...], Acts, str], ...] = (
    (("reward.threshold",),
     lambda r: r.reward.outcome == "indicator" or r.reward.length != "none" or r.reward.pass_k > 0,
     "reward.outcome=indicator, or reward.length or reward.pass_k"),
    (("reward.right",), lambda r: r.reward.outcome == "indicator", "reward.outcome=indicator"),
    (("reward.wrong",), lambda r: r.reward.outcome == "indicator" or r.reward.truncated_wrong,
     "reward.outcome=indicator or reward.truncated_wrong"),
    (("reward.answer_note",), lambda r: r.reward.outcome in ("majority", "agreement"),
     "reward.outcome=majority or agreement"),
    (("reward.length_weight",), lambda r: r.reward.length != "none", "reward.length"),
    (("reward.length_target", "reward.length_target_note"), lambda r: r.reward.length in LENGTHS_TO_TARGET,
     "reward.length=target, target_max or within"),
    (("reward.pass_form",), lambda r: r.reward.pass_k > 0, "reward.pass_k"),
    (("advantage.quantile",), lambda r: r.advantage.baseline == "quantile", "advantage.baseline=quantile"),
    (("advantage.soft_temperature",), lambda r: r.advantage.baseline == "soft_mean", "advantage.baseline=soft_mean"),
    (("advantage.equal_weight",), lambda r: r.advantage.equal != "nothing", "advantage.equal"),
    (("advantage.trees",), lambda r: r.advantage.credit == "path_mean", "advantage.credit=path_mean"),
    (("gae.turn_discount",), lambda r: r.advantage.credit == "bilevel_gae", "advantage.credit=bilevel_gae"),
    (("trust.beyond_low", "trust.beyond_high"), lambda r: r.trust.rule == "ppo", "trust.rule=ppo"),
    (("trust.uncertain_share",), lambda r: r.trust.rule in ("ppo", "aspo"), "trust.rule=ppo or aspo"),
    (("select.keep_by",), lambda r: r.select.keep_in_group > 0, "select.keep_in_group"),
    (("shape.entropy_bound",), lambda r: r.shape.entropy_bonus > 0, "shape.entropy_bonus"),
    (("shape.difficulty_low", "shape.difficulty_high", "shape.difficulty_centre"), lambda r: r.shape.difficulty > 0,
     "shape.difficulty"),
    (("shape.future_clip", "shape.future_largest", "shape.future_safe"), lambda r: r.shape.future > 0, "shape.future"),
    (("reuse.nll_weight",), lambda r: r.reuse.nll > 0 or "reuse.nll" in moving_numbers(r), "reuse.nll"),
    (("reuse.demonstration_advantage",), lambda r: r.reuse.demonstrations != "none", "reuse.demonstrations"),
)  # fmt: skip
"""settings, whether a recipe has what they act on, and its name"""
AFTERWARDS = ("entropy_bonus", "difficulty", "future", "positive_entropy")
"""settings of recipe.shape that look at the advantage"""


def dependent_problem(recipe: Recipe) -> str:
    """What of the recipe would do nothing, or cannot be together; empty: nothing."""
    plain = Recipe()
    for names, acts, needed in NEEDS:
        for name in names:
            if scheduled(recipe, name) != scheduled(plain, name) and not acts(recipe):
                return f"{name} does nothing without {needed}; leave it out"
    return _reward_problem(recipe) or _advantage_problem(recipe) or _shape_problem(recipe)


def _reward_problem(recipe: Recipe) -> str:
    reward, advantage = recipe.reward, recipe.advantage
    if reward.outcome in ("majority", "agreement") and not reward.answer_note:
        return f"reward.outcome={reward.outcome} needs reward.answer_note, the name of the task's note of the answer"
    if reward.length in LENGTHS_TO_TARGET and not reward.length_target and not reward.length_target_note:
        return f"reward.length={reward.length} needs reward.length_target, or reward.length_target_note"
    if reward.pass_k == 1:
        return "reward.pass_k is the number of answers of which the best counts; from 2, or 0"
    if reward.pass_k > 0 and (advantage.baseline, advantage.scale) != ("none", "none"):
        return "reward.pass_k gives what is left of a reward beside the group's; it needs baseline=none and scale=none"
    if reward.pass_k > 0 and reward.pass_form == "advantage" and reward.risk > 0:
        return "reward.risk does nothing with reward.pass_form=advantage, which looks at what is right alone"
    return ""


def _advantage_problem(recipe: Recipe) -> str:
    advantage, select = recipe.advantage, recipe.select
    later = advantage.baseline == "opob"
    if advantage.baseline_shift != 0 and (later or advantage.parts == "each" or advantage.credit != "trajectory"):
        return "advantage.baseline_shift compares outcomes; it needs advantage.credit=trajectory, and not baseline=opob"
    if advantage.equal != "nothing" and (later or select.drop_equal_rewards or select.drop_zero_signal):
        return "advantage.equal gives groups of equal rewards an advantage; select.* must not leave them out, nor opob"
    if advantage.scale == "mixed" and advantage.baseline != "group_mean":
        return "advantage.scale=mixed divides by mean and std of the group; it needs advantage.baseline=group_mean"
    if advantage.scale == "beta" and advantage.credit != "trajectory":
        return "advantage.scale=beta compares outcomes; it needs advantage.credit=trajectory"
    if advantage.credit == "tree_gain" and (advantage.baseline, advantage.scale) != ("none", "none"):
        return "advantage.credit=tree_gain is a difference of values; it needs baseline=none and scale=none"
    if select.keep_in_group > 0 and advantage.credit != "trajectory":
        return "select.keep_in_group compares the outcomes that it keeps; it needs advantage.credit=trajectory"
    if recipe.trust.rule == "dcpo" and recipe.ratio.level != "token":
        return "trust.rule=dcpo has a bound for the probability of a token; it needs ratio.level=token"
    if recipe.trust.rule == "real":
        if recipe.ratio.level != "token" or recipe.aggregate.mode != "group_mean_token_sum":
            return (
                "trust.rule=real takes mean log-ratios; it needs ratio.level=token, aggregate.mode=group_mean_token_sum"
            )
        if advantage.credit != "trajectory" or recipe.bias.kappa != "none":
            return (
                "trust.rule=real has one number for a trajectory; it needs advantage.credit=trajectory, bias.kappa=none"
            )
    return ""


def _shape_problem(recipe: Recipe) -> str:
    changed = [name for name in AFTERWARDS if getattr(recipe.shape, name)]
    if changed and recipe.advantage.baseline == "opob":
        return f"shape.{changed[0]} looks at the advantage, which advantage.baseline=opob finds only afterwards"
    if changed and recipe.trust.rule in ("regress", "disco", "real"):
        return f"shape.{changed[0]} changes the advantage of tokens; trust.rule={recipe.trust.rule} has none"
    if recipe.policy_weight == 0 and not _other_terms(recipe):
        return "policy_weight=0 leaves nothing to learn from"
    return ""


def _other_terms(recipe: Recipe) -> Any:
    return recipe.entropy or recipe.reuse.nll or recipe.positive_nll or kl_terms(recipe) or moving_numbers(recipe)
