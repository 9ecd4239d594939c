"""Rows of a batch that came back from the experience pool: what they are compared with, and which loss they have.

Formulas: docs/algorithms.md#reuse. Shapes: T policy tokens, I trajectories, G groups. A batch without such rows is
computed as if this file did not exist.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from async_rl.config.pool import PoolSettings
from async_rl.objective.axes import ReuseSettings
from async_rl.objective.recipe import Recipe, moving_numbers
from async_rl.objective.tokens import Tokens, segment_sum
from async_rl.objective.trust import Selection, Trust

OF_REPLAYED = ("replayed", "weight", "advantage", "self_imitation")
OF_DEMONSTRATIONS = ("demonstrations", "shape", "focal", "nll", "nll_weight", "demonstration_advantage")
"""settings of recipe.reuse that are for the one and for the other"""


def reused_advantage(tokens: Tokens, per_token: Tensor, reward: Tensor, recipe: Recipe) -> Tensor:
    """The advantage [T] with that of rows of the pool in its place. per_token [T], reward [I]."""
    reused, settings = tokens.columns.reused, recipe.reuse
    assert reused is not None
    back = (~reused.fresh & tokens.finite)[tokens.trajectory]
    own: Tensor | None = None
    if settings.statistics == "fresh":
        own = _against_fresh(tokens, reward, recipe)
        per_token = torch.where(back, own[tokens.trajectory], per_token)
    if settings.advantage == "stored":
        own = reused.advantage.double()
    elif settings.advantage == "recalibrated":
        own = reward - reused.baseline.double()
        if recipe.advantage.scale != "none":
            own = own / reused.scale.double()
    if settings.demonstration_advantage == "standardised":
        shown = reused.demonstration[tokens.trajectory] & back
        among_all = _against_fresh(tokens, tokens.reward, recipe, always=True)
        per_token = torch.where(shown, among_all[tokens.trajectory], per_token)
    if own is not None and settings.advantage != "group":
        replayed = reused.replayed[tokens.trajectory] & back
        per_token = torch.where(replayed, own[tokens.trajectory], per_token)
    if settings.positive_only:
        per_token = torch.where(back, per_token.clamp(min=0.0), per_token)
    return per_token


def _against_fresh(tokens: Tokens, reward: Tensor, recipe: Recipe, *, always: bool = False) -> Tensor:
    """(R - mean) / std of every trajectory against those of its group that are compared; a std of 0 is 1 (RL-PLUS). [I]

    always: whatever `advantage.scale` says."""
    group, num = tokens.group_of_trajectory, tokens.num_groups
    weight = tokens.compared.to(reward.dtype)
    count = segment_sum(weight, group, num)
    mean = segment_sum(reward * weight, group, num) / count.clamp(min=1.0)
    centred = reward - mean[group]
    if recipe.advantage.scale == "none" and not always:
        return centred
    less = 1.0 if recipe.advantage.std == "sample" else 0.0
    std = (segment_sum(centred.square() * weight, group, num) / (count - less).clamp(min=1.0)).sqrt()
    return centred / (torch.where(std > 0, std, 1.0) + recipe.advantage.std_epsilon)[group]


BY_GROUP = ("equal_rewards", "group_reward")
"""reasons of selection that compare the rewards of a group"""


def selected(selection: Selection, tokens: Tokens, settings: ReuseSettings) -> Selection:
    """Fresh trajectories in whose place others are trained are left out, too; rows of the pool with an advantage of
    their own are not compared with a group, and stay."""
    reused = tokens.columns.reused
    assert reused is not None
    apart = reused.replayed if settings.advantage != "group" else torch.zeros_like(reused.out)
    rejected = {why: mask & ~apart if why in BY_GROUP else mask for why, mask in selection.rejected.items()}
    rejected["replaced"] = reused.out
    keep = torch.ones_like(selection.keep)
    for mask in rejected.values():
        keep = keep & ~mask
    return replace(selection, keep=keep, rejected=rejected)


def policy_share(tokens: Tokens, recipe: Recipe) -> Tensor:
    """What each token's policy term is multiplied with: 0 outside of it, `reuse.weight` for replayed rows. [T]"""
    reused, settings = tokens.columns.reused, recipe.reuse
    assert reused is not None
    factor = reused.in_policy_term(settings).double()
    factor = torch.where(reused.replayed, settings.weight * factor, factor)[tokens.trajectory]
    if settings.focal > 0:
        damped = (-torch.expm1(tokens.log_prob.clamp(max=0.0))).pow(settings.focal)
        factor = torch.where(reused.demonstration[tokens.trajectory], factor * damped, factor)
    return factor


def demonstrated(tokens: Tokens, rule: Trust, settings: ReuseSettings) -> Trust:
    """The trust rule with the weights of demonstrations: their tokens have no behaviour policy, and no clip."""
    reused = tokens.columns.reused
    assert reused is not None
    if settings.demonstrations == "none" or not bool(reused.demonstration.any()):
        return rule
    probability = tokens.log_prob.exp()
    match settings.demonstrations:
        case "shaped":
            weight = settings.shape * probability / (probability + settings.shape).square()
        case "mixture":
            old = tokens.log_proximal.exp()
            weight = 2 * probability / (old + 0.5 * (old + 1))
        case _:
            weight = probability
    shown = reused.demonstration[tokens.trajectory]
    return replace(
        rule,
        weight=torch.where(shown, weight, rule.weight),
        full=torch.where(shown, weight, rule.full),
        clipped=rule.clipped & ~shown,
        dual=rule.dual & ~shown,
        extra=None if rule.extra is None else torch.where(shown, 0.0, rule.extra),
    )


def imitation(tokens: Tokens, per_token: Tensor, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """What the terms of imitation add to the policy column, [T], and their metrics. per_token: advantages, [T]."""
    reused, settings = tokens.columns.reused, recipe.reuse
    assert reused is not None
    ok = (tokens.finite & ~reused.out)[tokens.trajectory]
    shown = reused.demonstration[tokens.trajectory] & ok
    replayed = reused.replayed[tokens.trajectory] & ok
    added = torch.zeros_like(per_token)
    metrics: dict[str, Tensor] = {}
    if bool(shown.any()):
        share = shown.double() / shown.sum()
        added = added + settings.nll * share * _nll_weight(tokens, shown, settings)
        metrics["pool/nll"] = -(tokens.log_prob * share).sum()
    if bool(replayed.any()):
        share = replayed.double() / replayed.sum()
        if settings.self_imitation > 0:
            added = added + settings.self_imitation * per_token.clamp(min=0.0) * share
        log_ratio = tokens.log_prob - tokens.log_behaviour
        metrics["pool/advantage"] = (per_token * share).sum()
        metrics["pool/log_ratio"] = (log_ratio * share).sum()
        metrics["pool/log_ratio_std"] = ((log_ratio - metrics["pool/log_ratio"]).square() * share).sum().sqrt()
    return added, metrics


def _nll_weight(tokens: Tokens, shown: Tensor, settings: ReuseSettings) -> Tensor | float:
    """Weight of the likelihood of each token of a demonstration. shown [T] bool -> [T], or one for all."""
    probability = tokens.log_prob.exp()
    match settings.nll_weight:
        case "certainty":
            assert tokens.entropy is not None
            return float((-(tokens.entropy * shown).sum() / shown.sum()).exp())
        case "uncertainty":
            return probability * (1 - probability)
        case "probability":
            return probability
        case _:
            return 1.0


def reuse_problem(recipe: Recipe) -> str:
    """Choices of `recipe.reuse` that exclude each other or other axes, whatever comes back; empty: none."""
    settings, advantage = recipe.reuse, recipe.advantage
    recent = any(kl.recent > 0 for kl in (recipe.kl, *recipe.more_kl)) or "kl.recent" in moving_numbers(recipe)
    if recent and (recipe.kl.place == "reward" or recipe.kl.gradient == "k2"):
        return "kl.recent is for a KL in the loss with its own gradient (kl.place=loss, kl.gradient=own)"
    if settings == ReuseSettings():
        return ""
    if advantage.credit != "trajectory" or advantage.parts == "each":
        if settings.advantage != "group" or settings.statistics != "all":
            return "reuse.advantage and reuse.statistics compare outcomes; they need advantage.credit=trajectory"
    elif settings.statistics == "fresh" and (
        advantage.baseline != "group_mean" or advantage.scale not in ("none", "group_std")
    ):
        return "reuse.statistics=fresh needs advantage.baseline=group_mean and advantage.scale none or group_std"
    if settings.advantage != "group" and advantage.baseline == "opob":
        return f"reuse.advantage={settings.advantage} has its own baseline, which advantage.baseline=opob would find"
    if settings.positive_only and advantage.baseline == "opob":
        return "reuse.positive_only needs the advantage before advantage.baseline=opob is known"
    if settings.demonstrations != "none" and recipe.correction.rule != "none":
        return (
            "a demonstration has no behaviour policy for correction.rule to correct from; set reuse.demonstrations=none"
        )
    if settings.demonstrations != "none" and recipe.ratio.level != "token":
        return f"reuse.demonstrations={settings.demonstrations} weighs tokens; it needs ratio.level=token"
    if settings.demonstrations == "none" and settings.focal > 0:
        return "reuse.focal damps the policy term of demonstrations, and reuse.demonstrations=none has none"
    if settings.replayed == "none" and settings.weight != 1.0:
        return "reuse.weight is that of the policy term of replayed rows, and reuse.replayed=none has none"
    return ""


def reuse_effect_problem(recipe: Recipe, pool: PoolSettings) -> str:
    """Why the recipe and what the run's pool gives do not fit; empty: they do."""
    settings, plain = recipe.reuse, ReuseSettings()
    changed = [one.name for one in fields(ReuseSettings) if getattr(settings, one.name) != getattr(plain, one.name)]
    moving = {name.removeprefix("reuse.") for name in moving_numbers(recipe) if name.startswith("reuse.")}
    if pool.source == "none":
        return f"reuse.{changed[0]} does nothing with pool.source=none; see pool.source" if changed else ""
    shown = pool.source == "demonstrations"
    idle = [name for name in changed if name in (OF_REPLAYED if shown else OF_DEMONSTRATIONS)]
    if idle:
        return f"reuse.{idle[0]} does nothing with pool.source={pool.source}; leave it out"
    if shown and settings.demonstrations == "none" and not settings.nll and "nll" not in moving:
        return "pool.source=demonstrations would change nothing: set reuse.nll, or reuse.demonstrations"
    imitates = settings.self_imitation > 0 or "self_imitation" in moving
    if not shown and settings.replayed == "none" and not imitates:
        return f"pool.source={pool.source} would change nothing: reuse.replayed=none and reuse.self_imitation=0"
    trained = settings.demonstrations != "none" if shown else settings.replayed != "none" or imitates
    grouped = recipe.advantage.credit in ("trajectory", "token_return") and recipe.advantage.baseline not in (
        "none",
        "noted",
    )
    alone = pool.place in ("extra", "instead") and pool.source != "groups"
    if trained and grouped and alone and settings.advantage == "group" and settings.statistics == "all":
        return (
            f"pool.place={pool.place} gives rows that are compared with nothing, so that their advantage is 0; set "
            + ("pool.place=join, or reuse.nll alone" if shown else "reuse.advantage=stored or recalibrated")
        )
    return ""
