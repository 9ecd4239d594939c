"""Choices of a recipe that exclude each other, or would do nothing: refused with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import get_args

from async_rl.config.pool import PoolSettings
from async_rl.errors import UserError, nearest
from async_rl.objective.axes import EssSettings, KlSettings
from async_rl.objective.dependent import dependent_problem
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import WITH_CRITIC, Measured, Recipe, kl_terms, moving_numbers
from async_rl.objective.reuse import reuse_effect_problem, reuse_problem
from async_rl.objective.reward_axes import RewardSettings
from async_rl.objective.schedule import scheduled
from async_rl.objective.shaping_axes import ShapeSettings

SIGN_FREE = ("none", "truncate", "interval", "cispo", "damp", "m2po_all")
"""rules that do not look at the advantage, hence usable with a baseline found after the backward pass"""


def check_recipe(recipe: Recipe) -> None:
    """Refuse choices that exclude each other whatever the set-up. Raises UserError."""
    for problem in (
        _ratio_problem(recipe),
        _bounds_problem(recipe),
        _opob_problem(recipe),
        _control_problem(recipe),
        *(_regulariser_problem(kl) for kl in (recipe.kl, *recipe.more_kl)),
        _more_kl_problem(recipe),
        _reward_problem(recipe),
        _groupwise_problem(recipe),
        _schedule_problem(recipe),
        _turn_order_problem(recipe),
        _token_order_problem(recipe),
        _critic_problem(recipe),
        _controller_problem(recipe),
        _teaching_problem(recipe),
        _compared_turns_problem(recipe),
        _pruning_problem(recipe),
        _forks_problem(recipe),
        _median_problem(recipe),
        reuse_problem(recipe),
        dependent_problem(recipe),
    ):
        if problem:
            raise UserError(f"recipe {recipe.name}: {problem}")


def check_effect(
    recipe: Recipe,
    *,
    group_size: int,
    updates_per_batch: int,
    max_staleness: int,
    has_critic: bool,
    single_turn: bool,
    credits_turns: bool = False,
    noted: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    pool: PoolSettings | None = None,
) -> list[str]:
    """Refuse a recipe that would have no effect in this set-up; notes on what is allowed but idle.

    single_turn, credits_turns, noted (names of its notes), parts (of its reward): of the task; None: not known. pool:
    of the run; None: not known.

    Raises UserError with the reason and the remedy.
    """
    if is_own_function(recipe.name):
        return []  # what it does with the axes is known to itself alone
    check_recipe(recipe)
    problem = _setup_problem(recipe, group_size, updates_per_batch, has_critic)
    problem = problem or _names_problem(recipe, noted, parts)
    problem = problem or ("" if pool is None else reuse_effect_problem(recipe, pool))
    if not problem and single_turn and recipe.turn_order != "together":
        problem = f"turn_order={recipe.turn_order} does nothing on a task of single turns; take turn_order=together"
    if not problem and credits_turns and recipe.advantage.credit == "trajectory":
        problem = (
            "advantage.credit=trajectory sees the reward of an episode alone, and this task gives its rewards to "
            "turns; take a recipe with turn-level credit, e.g. turn_return, gigpo or ppo"
        )
    if problem:
        raise UserError(f"recipe {recipe.name}: {problem}")
    return _notes(recipe, updates_per_batch, max_staleness, has_critic, single_turn)


def _ratio_problem(recipe: Recipe) -> str:
    ratio, trust = recipe.ratio, recipe.trust
    if ratio.level == "none" and trust.rule not in ("none", "gmpo", "dppo", "disco"):
        return (
            f"trust.rule={trust.rule} with ratio.level=none acts on a ratio that is 1 by construction; "
            "choose ratio.level token, turn or sequence, or trust.rule=none"
        )
    if trust.rule == "kl_cov" and ratio.level != "token":
        return "trust.rule=kl_cov penalises the token's own log-ratio; it needs ratio.level=token"
    if trust.rule in ("m2po", "m2po_all", "dppo", "gmpo", "aspo", "cpgd", "vespo") and ratio.level != "token":
        return f"trust.rule={trust.rule} is defined on token ratios; it needs ratio.level=token"
    if trust.rule == "regress" and (ratio.level, ratio.pool) != ("sequence", "sum"):
        return (
            "trust.rule=regress compares log-ratios of trajectories; it needs ratio.level=sequence and ratio.pool=sum"
        )
    if ratio.denominator == "group_expected" and (ratio.level, ratio.pool) != ("sequence", "mean"):
        return "ratio.denominator=group_expected is for answers; it needs ratio.level=sequence and ratio.pool=mean"
    if ratio.denominator == "mixture" and not 0 < ratio.mixture_weight < 1:
        return "ratio.mixture_weight must lie strictly between 0 and 1"
    if recipe.correction.rule != "none" and ratio.denominator not in (
        "proximal", "proximal_loglinear", "reference",
    ):  # fmt: skip
        return (
            f"correction.rule={recipe.correction.rule} corrects from behaviour to the proximal policy, which "
            f"ratio.denominator={ratio.denominator} already contains: staleness would be counted twice. Set "
            "correction.rule=none or ratio.denominator=proximal (or reference, a moving average: PPO-EWMA)"
        )
    return ""


def _bounds_problem(recipe: Recipe) -> str:
    trust, select, correction = recipe.trust, recipe.select, recipe.correction
    if (
        trust.rule in ("ppo", "cispo", "gmpo", "clip_cov", "sat", "aspo", "cpgd", "gbpo", "bpo", "mix_ppo")
        and min(trust.clip_low, trust.clip_high) < 0
    ):
        return "trust.clip_low and trust.clip_high must not be negative"
    if trust.rule == "bapo" and not trust.low_start <= trust.low_end < 1 < trust.high_start <= trust.high_end:
        return "bapo needs trust.low_start <= low_end < 1 < high_start <= high_end"
    if select.group_high > 0 and select.group_low >= select.group_high:
        return "select.group_low must lie below select.group_high; as it is every group is rejected"
    if trust.rule in ("ppo", "clip_cov") and 0 < trust.dual_clip <= 1 + trust.clip_high:
        return "trust.dual_clip must lie above 1 + trust.clip_high (published value: 3)"
    if trust.rule in ("truncate", "topr") and trust.cap <= 0:
        return "trust.cap must be positive; with 0 every coefficient is zero"
    if trust.rule == "interval" and not 0 <= trust.low < trust.high:
        return "trust.low must lie below trust.high; as it is every token is masked"
    if trust.rule == "interval" and not trust.low <= 1 <= trust.high:
        return "the interval trust.low..trust.high does not contain 1: on-policy tokens would be masked"
    if correction.rule == "interval" and not correction.low <= 1 <= correction.high:
        return "the interval correction.low..correction.high does not contain 1"
    if correction.rule == "truncate" and correction.high <= 0:
        return "correction.high must be positive"
    for name in ("sequence", "geometric"):
        low, high = getattr(select, f"{name}_low"), getattr(select, f"{name}_high")
        if low > 1 or 0 < high < 1:
            return f"select.{name}_low..{name}_high does not contain 1: on-policy data would be rejected"
    if trust.rule == "truncate" and recipe.ratio.denominator == "mixture" and recipe.ratio.level == "token":
        bound = 1 / recipe.ratio.mixture_weight
        if trust.cap >= bound:
            return (
                f"the mixture denominator bounds the ratio by 1 / mixture_weight = {bound:g}, below "
                f"trust.cap={trust.cap}: the truncation never acts. Lower trust.cap or set trust.rule=none"
            )
    if select.veto >= 1:
        return "select.veto must lie below 1: on-policy data would be rejected"
    if trust.rule == "truncate" and recipe.ratio.level == "sequence":
        bound = select.sequence_high if recipe.ratio.pool == "sum" else select.geometric_high
        if 0 < bound <= trust.cap and recipe.ratio.denominator == "behaviour":
            return (
                f"trajectories with a ratio above {bound} are rejected before trust.cap={trust.cap} could "
                "truncate any: the truncation never acts. Lower trust.cap or raise the bound"
            )
    return ""


def _opob_problem(recipe: Recipe) -> str:
    advantage = recipe.advantage
    if advantage.baseline != "opob":
        if advantage.baseline == "virtual_max" and advantage.credit != "trajectory":
            return "advantage.baseline=virtual_max compares outcomes; it needs advantage.credit=trajectory"
        return ""
    for name, used in (
        ("shape.clarity", recipe.shape.clarity != 0),
        ("mask.advantage_sigma", recipe.mask.advantage_sigma > 0),
        ("select.largest_share", recipe.select.largest_share < 1),
    ):
        if used:
            return f"{name} looks at the advantage, which advantage.baseline=opob finds only afterwards"
    if advantage.credit != "trajectory" or advantage.whiten or advantage.scale == "group_mean":
        return (
            "advantage.baseline=opob needs advantage.credit=trajectory, advantage.whiten=false and "
            "advantage.scale none, group_std or batch_std"
        )
    if recipe.trust.rule not in SIGN_FREE or recipe.select.opsm > 0:
        return (
            "advantage.baseline=opob is found from gradients that must not depend on the advantage's sign; "
            f"use trust.rule {', '.join(SIGN_FREE)} and select.opsm=0"
        )
    if recipe.bias.kappa == "per_trajectory":
        return "bias.kappa=per_trajectory needs the advantage before OPOB is known; use guarded or relative"
    per_trajectory = recipe.ratio.level in ("none", "sequence") and recipe.aggregate.mode not in (
        "turn_mean",
        "seq_mean_turn_mean",
    )
    if recipe.opob.weight != "estimator" and not (per_trajectory and recipe.trust.rule != "m2po_all"):
        return (
            f"opob.weight={recipe.opob.weight} is defined for one weight per trajectory; use ratio.level=none "
            "or sequence with a token or sequence mean, or opob.weight=estimator"
        )
    if recipe.opob.norm == "exact" and (
        recipe.entropy or recipe.positive_nll or recipe.band.weight or _kl_in_loss(recipe)
    ):
        return (
            "with opob.norm=exact the gradient is formed from the reward's part alone; KL, entropy and NLL "
            "terms in the loss need opob.norm=logit or length (or kl.place=reward)"
        )
    return ""


def _kl_in_loss(recipe: Recipe) -> bool:
    return any(kl.place == "loss" for kl in kl_terms(recipe))


def _control_problem(recipe: Recipe) -> str:
    ess, bias = recipe.ess, recipe.bias
    if isinstance(ess.reference, str) and ess.reference != "calibrated":
        return f"ess.reference must be a number or calibrated, not {ess.reference!r}"
    if not isinstance(ess.reference, str) and not (isfinite(ess.reference) and 0 < ess.reference <= 1):
        return "ess.reference must lie in (0, 1]"
    if not 0 <= ess.decay < 1 or not 0 <= bias.decay < 1:
        return "ess.decay and bias.decay must lie in [0, 1)"
    if not 0 <= ess.floor <= 1:
        return f"ess.floor is {ess.floor:g}; it is a share of the run's start, from 0 to 1"
    for name in ("decay", "floor"):
        if not isinstance(ess.reference, str) and getattr(ess, name) != getattr(EssSettings(), name):
            return f"ess.{name} does nothing with ess.reference={ess.reference:g}; set ess.reference=calibrated"
    if bias.kappa == "none":
        return ""
    if recipe.trust.rule == "none":
        return (
            f"bias.kappa={bias.kappa} measures what the trust rule cuts away, and trust.rule=none cuts "
            "nothing: kappa would be 1 always"
        )
    if bias.kappa == "per_trajectory" and bias.estimator == "exact":
        return "bias.kappa=per_trajectory has no exact estimator; use bias.estimator scalar or logit"
    return ""


def _reward_problem(recipe: Recipe) -> str:
    reward, advantage = recipe.reward, recipe.advantage
    if bool(reward.bonus_note) != (reward.bonus != 0 or "reward.bonus" in moving_numbers(recipe)):
        return "reward.bonus and reward.bonus_note, the name of the task's note, belong together"
    if 0 < reward.overlong_limit < reward.overlong_buffer:
        return "reward.overlong_buffer must not exceed reward.overlong_limit"
    if (advantage.baseline == "noted") != bool(advantage.note):
        return "advantage.baseline=noted and advantage.note, the name of the task's note, belong together"
    if advantage.baseline == "noted" and (advantage.credit != "trajectory" or advantage.scale != "none"):
        return "advantage.baseline=noted needs advantage.credit=trajectory and advantage.scale=none"
    if advantage.parts == "each":
        if advantage.credit != "trajectory" or advantage.baseline in ("opob", "noted", "virtual_max"):
            return "advantage.parts=each needs advantage.credit=trajectory and a baseline of the group"
        if reward != RewardSettings():
            return "reward.* changes the sum of the parts, which advantage.parts=each does not look at"
        if any(kl.place == "reward" for kl in kl_terms(recipe)):
            return "advantage.parts=each compares the parts alone; kl.place=reward would do nothing"
    if advantage.whiten_trajectories and (advantage.credit != "trajectory" or advantage.whiten):
        return "advantage.whiten_trajectories needs advantage.credit=trajectory, and not advantage.whiten as well"
    return ""


def _groupwise_problem(recipe: Recipe) -> str:
    trust, advantage = recipe.trust, recipe.advantage
    if trust.rule not in ("regress", "disco"):
        return ""
    if advantage.credit != "trajectory" or advantage.whiten:
        return f"trust.rule={trust.rule} has one number for a trajectory; it needs advantage.credit=trajectory"
    if trust.rule == "regress" and trust.beta <= 0:
        return "trust.beta must be positive: with 0 there is no regression"
    if trust.rule == "disco" and recipe.aggregate.mode != "group_mean_token_sum":
        return "trust.rule=disco has its own denominators; it needs aggregate.mode=group_mean_token_sum"
    if recipe.bias.kappa != "none":
        return f"trust.rule={trust.rule} cuts nothing away that bias.kappa could measure"
    return ""


def _critic_problem(recipe: Recipe) -> str:
    credit, gae = recipe.advantage.credit, recipe.gae
    if credit == "turn_q":
        for name in ("length_adaptive", "value_clip"):
            if getattr(gae, name):
                return f"gae.{name} does nothing with advantage.credit=turn_q; leave it out"
    plain = credit == "token_gae" and gae.critic_trace == 1 and not gae.value_clip and recipe.trust.rule != "bpo"
    if gae.value_earlier and not plain:
        return (
            "gae.value_earlier trains the critic on returns of earlier tokens; it needs advantage.credit=token_gae, "
            "gae.critic_trace=1, gae.value_clip=0 and another trust.rule than bpo"
        )
    if recipe.trust.loss_weight != 1 and recipe.trust.rule not in ("none", "regress"):
        return f"trust.loss_weight does nothing with trust.rule={recipe.trust.rule}; it is for none and regress"
    return ""


def _token_order_problem(recipe: Recipe) -> str:
    order = f"token_order={recipe.token_order}"
    if recipe.token_order == "together":
        return f"token_order_at does nothing with {order}; leave it out" if recipe.token_order_at != 0.5 else ""
    if recipe.turn_order != "together":
        return f"{order} and turn_order={recipe.turn_order} exclude each other; set one of them to together"
    if recipe.ratio.level not in ("none", "token") or recipe.trust.rule in ("regress", "disco"):
        return (
            f"{order} parts answers, and ratio.level={recipe.ratio.level} with trust.rule={recipe.trust.rule} looks at "
            "more than a token; it needs ratio.level=token"
        )
    if recipe.advantage.credit == "turn_q":
        return f"{order} does not go with advantage.credit=turn_q, whose critic learns whole turns"
    if recipe.advantage.baseline == "opob" or recipe.positive_nll or recipe.bias.kappa != "none":
        return f"{order} parts answers, and advantage.baseline=opob, positive_nll and bias.kappa look at whole ones"
    return ""


def _turn_order_problem(recipe: Recipe) -> str:
    if recipe.turn_order == "together":
        return ""
    if recipe.ratio.level != "turn":
        return f"turn_order={recipe.turn_order} multiplies the ratios of turns; it needs ratio.level=turn"
    if recipe.advantage.credit == "turn_q":
        return f"turn_order={recipe.turn_order} does not go with advantage.credit=turn_q, whose critic learns all turns"
    if recipe.advantage.baseline == "opob" or recipe.positive_nll or recipe.bias.kappa != "none":
        return (
            f"turn_order={recipe.turn_order} trains a part of each trajectory at a time, and advantage.baseline=opob, "
            "positive_nll and bias.kappa look at whole ones"
        )
    return ""


def _more_kl_problem(recipe: Recipe) -> str:
    for number, kl in enumerate(recipe.more_kl):
        if kl.coefficient == 0:
            return f"more_kl[{number}].coefficient is 0, so the term does nothing; leave it out"
        if kl.adaptive_target > 0:
            return f"more_kl[{number}].adaptive_target: only recipe.kl has a coefficient that adapts"
    return ""


def _schedule_problem(recipe: Recipe) -> str:
    for moves in recipe.schedule:
        known = scheduled(recipe, moves.number)
        if isinstance(known, bool) or not isinstance(known, float) or moves.number.startswith(("ess.", "bias.")):
            return f"schedule: {moves.number!r} is no number of the recipe that can move with the step"
        if moves.until <= moves.since:
            return f"schedule of {moves.number}: until={moves.until} must lie behind since={moves.since}"
        if moves.start == moves.end:
            return f"schedule of {moves.number}: start and end are both {moves.start:g}; set it without a schedule"
    return ""


def _controller_problem(recipe: Recipe) -> str:
    if not recipe.controller:
        return ""
    numbers = [controller.number for controller in recipe.controller]
    for controller in recipe.controller:
        name, start = controller.number, scheduled(recipe, controller.number)
        where = f"controller of {name}"
        if isinstance(start, bool) or not isinstance(start, float) or name.startswith(("ess.", "bias.")):
            return f"controller: {name!r} is no number of the recipe that can follow a metric"
        if numbers.count(name) > 1 or any(moves.number == name for moves in recipe.schedule):
            return f"{where}: the number has another controller or a schedule; leave one of them out"
        if controller.metric not in get_args(Measured):
            return f"{where}: metric is {controller.metric!r}; {nearest(controller.metric, get_args(Measured))}"
        if controller.law == "multiply" and (controller.target == 0 or start == 0):
            return f"{where}: law=multiply needs a target and a first value other than 0; take law=add"
        if controller.law != "switch" and (controller.rate == 0 or controller.low >= controller.high):
            return f"{where}: it needs a rate other than 0, and low below high, or it never moves"
        if controller.law != "switch" and not controller.low <= start <= controller.high:
            return (
                f"{where}: the first value, {start:g}, must lie between low={controller.low:g} and {controller.high:g}"
            )
        if controller.law == "switch" and controller.then == start:
            return f"{where}: `then` is {start:g}, the value before; the switch would do nothing"
    if recipe.kl.adaptive_target > 0 and "kl.coefficient" in numbers:
        return "kl.adaptive_target and a controller of kl.coefficient exclude each other; leave one of them out"
    return ""


def _teaching_problem(recipe: Recipe) -> str:
    teaching = recipe.teaching
    if teaching.coefficient == 0 and "teaching.coefficient" not in moving_numbers(recipe):
        return "teaching.alone needs a teaching.coefficient: nothing would be learned" if teaching.alone else ""
    if recipe.advantage.baseline == "opob" or recipe.trust.rule in ("regress", "disco"):
        return (
            "teaching.coefficient adds to the advantage of each token; it needs another baseline than opob, and a "
            "trust.rule other than regress and disco"
        )
    if teaching.alone and recipe.shape != ShapeSettings():
        return "shape.* changes the advantage of rewards, which teaching.alone leaves out"
    return ""


def _median_problem(recipe: Recipe) -> str:
    if recipe.trust.rule != "bpo":
        return ""
    if recipe.advantage.credit != "token_gae" or recipe.advantage.whiten or recipe.turn_order != "together":
        return (
            "trust.rule=bpo compares returns with their median; it needs advantage.credit=token_gae, whiten=false and "
            "turn_order=together"
        )
    return ""


def _forks_problem(recipe: Recipe) -> str:
    advantage = recipe.advantage
    if advantage.credit == "segment_gain" and (advantage.baseline, advantage.scale) != ("none", "none"):
        return "advantage.credit=segment_gain is a difference of values; it needs baseline=none and scale=none"
    if advantage.baseline == "greedy" and advantage.credit not in ("trajectory", "path_mean"):
        return "advantage.baseline=greedy compares outcomes; it needs advantage.credit=trajectory"
    if advantage.credit in ("path_mean", "segment_gain") and advantage.baseline == "opob":
        return "advantage.baseline=opob needs advantage.credit=trajectory"
    return ""


def _pruning_problem(recipe: Recipe) -> str:
    select, advantage = recipe.select, recipe.advantage
    if not select.before_forward:
        return ""
    if select.largest_share == 1 and select.keep_in_group == 0:
        return "select.before_forward leaves nothing out with select.largest_share=1 and select.keep_in_group=0"
    if select.keep_in_group > 0 and select.keep_by != "variance":
        return "select.before_forward takes their tokens from trajectories; it needs select.keep_by=variance"
    if select.denominator != "kept":
        return "select.before_forward needs select.denominator=kept: who is left out is not counted"
    if advantage.credit != "trajectory" or advantage.baseline in ("opob", "noted") or advantage.whiten:
        return (
            "select.before_forward knows rewards alone; it needs advantage.credit=trajectory, a baseline of the group, "
            "and no whitening over tokens"
        )
    reward = recipe.reward
    of_tokens = reward.unlikely > 0 or reward.length != "none" or reward.outcome == "certainty"
    if reward.overlong_limit > 0 or advantage.baseline == "length_weighted" or of_tokens:
        return "select.before_forward takes their tokens from trajectories, whose lengths the advantage looks at"
    if any(number.startswith(("select.", "advantage.", "reward.")) for number in moving_numbers(recipe)):
        return "select.before_forward does not know numbers of select, advantage and reward that move"
    if any(kl.place == "reward" for kl in kl_terms(recipe)) or recipe.teaching.coefficient > 0:
        return "select.before_forward knows rewards alone, not log-probs: no kl.place=reward and no teaching"
    return ""


def _compared_turns_problem(recipe: Recipe) -> str:
    advantage = recipe.advantage
    changed = advantage.among != "group" or advantage.turns != "returns"
    if changed and advantage.credit != "turn_return":
        return "advantage.among and advantage.turns are about turns; they need advantage.credit=turn_return"
    return ""


def _names_problem(recipe: Recipe, noted: Sequence[str] | None, parts: Sequence[str] | None) -> str:
    """What the recipe reads of the task and the task is known not to give."""
    settings = {
        "select.drop_flag": recipe.select.drop_flag,
        "advantage.note": recipe.advantage.note,
        "reward.bonus_note": recipe.reward.bonus_note,
        "reward.answer_note": recipe.reward.answer_note,
        "reward.length_target_note": recipe.reward.length_target_note,
    }
    for name, wanted in settings.items():
        if wanted and noted is not None and wanted not in noted:
            if not noted:
                return f"{name} names '{wanted}', and this task notes nothing (Session.note, Session.note_turn)"
            return f"{name} names '{wanted}', which this task does not note; {nearest(wanted, noted)}"
    if recipe.advantage.parts == "each" and parts is not None and not parts:
        return "advantage.parts=each compares the named parts of rewards, and this task's reward is a plain number"
    return ""


def _regulariser_problem(kl: KlSettings) -> str:
    if (kl.target == "proxy") != (kl.tokens == "protected"):
        return "kl.target=proxy and kl.tokens=protected belong together (Lp-Reg)"
    if kl.target == "proxy" and kl.place == "reward":
        return "kl.target=proxy is for kl.place=loss"
    if kl.taken_at == "update" and kl.place != "reward":
        return "kl.taken_at is for kl.place=reward; a KL in the loss is always that of the update"
    if kl.place == "reward" and (kl.allowance > 0 or kl.largest_slope > 0 or kl.certain_share < 1):
        return "kl.allowance, largest_slope and certain_share are for kl.place=loss"
    if kl.coefficient == 0:
        return "" if kl.adaptive_target == 0 else "kl.adaptive_target adapts kl.coefficient, which is 0"
    if kl.place == "loss" and kl.estimator == "k1" and kl.gradient == "own" and kl.importance != "through":
        return (
            "k1 in the loss has zero expected gradient; set kl.gradient=k2 (same value, right gradient), "
            "kl.importance=through, or kl.place=reward"
        )
    return ""


def _setup_problem(recipe: Recipe, group_size: int, updates_per_batch: int, has_critic: bool) -> str:
    advantage = recipe.advantage
    if recipe.ratio.denominator == "proximal" and updates_per_batch == 1:
        return (
            "ratio.denominator=proximal with one update a batch makes every ratio 1 by construction, so "
            f"trust.rule={recipe.trust.rule} does nothing; use ratio.denominator=behaviour, or more updates "
            "a batch"
        )
    if recipe.trust.rule == "mix_ppo" and updates_per_batch == 1:
        return (
            "trust.rule=mix_ppo bounds the move since the start of the step, and with one update a batch there is "
            "none; use trust.rule=ppo, or more updates a batch"
        )
    if recipe.kl.coefficient and recipe.kl.target == "proximal" and updates_per_batch == 1:
        return "kl.target=proximal with one update a batch is 0 by construction; use behaviour or reference"
    if any(kl.target == "proximal" for kl in recipe.more_kl) and updates_per_batch == 1:
        return "a KL to the proximal policy with one update a batch is 0 by construction"
    needs_critic = advantage.credit in WITH_CRITIC
    if needs_critic and not has_critic:
        return f"advantage.credit={advantage.credit} needs a critic; turn it on in the trainer's settings"
    grouped = advantage.baseline not in ("none", "noted") or advantage.scale in ("group_std", "group_mean", "mixed")
    whole_batch = advantage.baseline == "opob" and recipe.opob.scope == "batch"
    if not needs_critic and group_size == 1 and grouped and advantage.baseline != "virtual_max":
        name = f"advantage.baseline={advantage.baseline}"
        if advantage.baseline == "none":
            name = f"advantage.scale={advantage.scale}"
        scope = " (its batch scope still centres within groups)" if whole_batch else ""
        return (
            f"{name} with groups of one trajectory makes every advantage 0{scope}; raise the group size or "
            "choose a recipe without a group baseline (reinforce_pp, ppo)"
        )
    return ""


def _notes(
    recipe: Recipe, updates_per_batch: int, max_staleness: int, has_critic: bool, single_turn: bool
) -> list[str]:
    notes = []
    fresh = max_staleness == 0 and updates_per_batch == 1
    if fresh and recipe.trust.rule != "none":
        notes.append(
            f"with max_staleness=0 and one update a batch every ratio is 1 up to the engine's mismatch: "
            f"trust.rule={recipe.trust.rule} rarely acts"
        )
    if max_staleness > 0 and recipe.ratio.level == "none":
        notes.append("ratio.level=none does not correct for stale data; meant for max_staleness=0")
    if fresh and recipe.ess.scale != "none":
        notes.append("with max_staleness=0 the ESS scale reacts to engine mismatch only")
    if single_turn and recipe.ratio.level == "turn":
        notes.append("on single-turn data the turn ratio is the sequence ratio")
    if single_turn and recipe.advantage.credit in ("turn_return", "turn_group", "gigpo", "turn_gae"):
        notes.append(f"on single-turn data advantage.credit={recipe.advantage.credit} has one turn to credit")
    if recipe.advantage.credit == "gigpo":
        notes.append("gigpo needs turns with a state key; where the task gives none it is the outcome's part")
    if has_critic and recipe.advantage.credit not in WITH_CRITIC:
        notes.append("the critic is not used by this recipe")
    if recipe.bias.kappa == "literal":
        notes.append("bias.kappa=literal raises the learning rate while the bias is below 1; for ablations")
    if recipe.opob.norm == "exact" and recipe.advantage.baseline == "opob" and recipe.bias.kappa != "none":
        notes.append("kappa's free estimators use the length estimate of OPOB, not the exact baseline")
    return notes
