"""Relations of the rollout plan to the rest (checks.py)."""

from __future__ import annotations

from async_rl.config.rollout import RolloutSettings
from async_rl.config.sampler import SamplerSettings
from async_rl.config.settings import Settings


def forks_have_parents_and_groups(s: Settings) -> str:
    plan, usual = s.rollout, RolloutSettings()
    if not plan.roots:
        for name in ("shape", "children", "fork", "first_tokens", "below", "per_cut"):
            if getattr(plan, name) != getattr(usual, name):
                return f"rollout.{name} does nothing with rollout.roots=0, where every answer begins with the prompt"
        return ""
    if plan.roots >= s.batch.group_size:
        return (
            f"rollout.roots is {plan.roots}, and a group has batch.group_size={s.batch.group_size} answers: none is "
            "left to be a fork; lower rollout.roots, or set it to 0"
        )
    if s.sampler.start != "none":
        return "rollout.roots and sampler.start exclude each other: an answer begins with one thing; leave one out"
    for name, where in (("children", "shape"), ("first_tokens", "fork"), ("below", "fork"), ("per_cut", "fork")):
        if getattr(plan, name) != getattr(usual, name) and not _reads(plan, name):
            return f"rollout.{name} does nothing with rollout.{where}={getattr(plan, where)}; leave it out"
    return ""


def a_greedy_answer_is_beside_others(s: Settings) -> str:
    if not s.rollout.greedy:
        return ""
    if s.rollout.roots:
        return "rollout.greedy and rollout.roots exclude each other: the first answer would be a root and untrained"
    if s.batch.group_size < 2:
        return "rollout.greedy needs batch.group_size=2 or more: the greedy answer is not trained"
    return ""


def _reads(plan: RolloutSettings, name: str) -> bool:
    match name:
        case "children":
            return plan.shape == "tree"
        case "first_tokens":
            return plan.fork == "uncertain_turn"
        case "below":
            return plan.fork == "improbable_token"
        case _:
            return plan.fork != "uncertain_turn"


def pieces_go_on_alone(s: Settings) -> str:
    if not s.rollout.window:
        return ""
    why = "an episode's pieces are trained before its reward is known"
    if s.batch.group_size > 1:
        return (
            f"rollout.window needs batch.group_size=1 (now {s.batch.group_size}): {why}, so answers of a group cannot "
            "be compared; ask more problems with batch.groups_per_step"
        )
    if s.sampler != SamplerSettings():
        return f"rollout.window and sampler.* exclude each other: {why}; leave sampler.* out, or set rollout.window=0"
    if s.pool.source != "none":
        return f"rollout.window and pool.source={s.pool.source} exclude each other: {why}, and pieces do not come back"
    return ""


ROLLOUT_RELATIONS = (forks_have_parents_and_groups, a_greedy_answer_is_beside_others, pieces_go_on_alone)
