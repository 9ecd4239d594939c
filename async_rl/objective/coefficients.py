"""Columns -> coefficients: the one function that every recipe of the library goes through.

The sum over tokens of `policy[t] * grad log pi(y_t)` is the gradient of the recipe's published surrogate
(docs/algorithms.md#coefficients). Order: clean, ratio, advantage, trust rule, selection, shares, baseline, KL, factors
of the learning rate.

Shapes: T policy tokens, I trajectories, G groups of the whole batch; float64 inside, the columns' dtype outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from async_rl.objective.advantage import (
    Advantage,
    advantage_of,
    log_opob_weight,
    optimal_baseline,
    proxy_log_norm_square,
)
from async_rl.objective.axes import AggregateSettings
from async_rl.objective.group_filter import kept_in_groups
from async_rl.objective.kl import adapted, kl_loss, kl_now, kl_penalty
from async_rl.objective.measures import (
    Meter,
    effective_sample_size,
    ess_ratio,
    kappa_of,
    kappa_per_trajectory,
    logit_size,
    mean_of,
    measure_ess,
    measure_lag,
    measure_outcome,
    measure_ratios,
    measure_selection,
    measure_signal,
    measure_teacher,
    measure_trust,
    scalar_size,
    without_empty_buckets,
)
from async_rl.objective.modulation import modulated
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import Recipe, has_kl, requirements
from async_rl.objective.returns import Returns, value_loss, with_median
from async_rl.objective.reuse import (
    demonstrated,
    imitation,
    policy_share,
    reused_advantage,
    selected,
)
from async_rl.objective.rewards import shaped_reward
from async_rl.objective.schedule import controlled, recipe_at
from async_rl.objective.shaping import distance, factor, mask, shaped_advantage, taught
from async_rl.objective.state import ObjectiveState, Past
from async_rl.objective.tokens import (
    Coefficients,
    Columns,
    Ratio,
    Tokens,
    ratio_of,
    segment_sum,
    tokens_of,
)
from async_rl.objective.trust import Selection, Trust, correction_weight, select, trust
from async_rl.objective.turn_order import updated_now, weight_of_updated


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """The policy-gradient part of a recipe on one batch, before its baseline is known."""

    tokens: Tokens
    ratio: Ratio
    advantage: Advantage
    trust: Trust
    selection: Selection
    share: Tensor  # [T], 0 where rejected
    base: Tensor  # [T], share * correction * per-trajectory kappa
    penalty: Tensor | None  # [T], KL in the reward

    def column(self, weight: Tensor, advantage: Tensor) -> Tensor:
        """Coefficients of sum_t base_t * surrogate with this weight and advantage, all [T]."""
        per_token = self.base * weight * advantage
        return self.ratio.pull_back(per_token, self.tokens) if self.trust.through else per_token


PLAIN = Recipe()
"""the recipe whose axes all have their defaults"""

Objective = Callable[[Columns, Recipe, ObjectiveState], tuple[Coefficients, ObjectiveState]]


def objective_of(recipe: Recipe) -> Objective:
    """What turns columns into coefficients for `recipe`: the library's `coefficients`, or the user's own function."""
    if not is_own_function(recipe.name):
        return coefficients
    from async_rl.objective.own_coefficients import own_coefficients

    return own_coefficients


@torch.no_grad()
def coefficients(columns: Columns, recipe: Recipe, state: ObjectiveState) -> tuple[Coefficients, ObjectiveState]:
    """Coefficients of one optimizer step, and the state after it.

    Pure: the same arguments give the same answer; `columns` is the whole batch, so every count, group
    and ESS in here is global. Raises ValueError when a column that the recipe needs is missing.
    """
    meter = Meter()
    need = requirements(recipe)
    written = recipe
    if recipe.schedule or recipe.controller:
        recipe = recipe_at(recipe, columns.current_version, state)
    surrogate = _surrogate(columns, recipe, state)
    tokens, keep = surrogate.tokens, surrogate.selection.keep
    advantage, baseline = _baselined(surrogate, recipe, meter)
    policy = surrogate.column(surrogate.trust.weight, _policy_advantage(surrogate, recipe, advantage))
    if surrogate.trust.extra is not None:
        policy = policy + surrogate.base * surrogate.trust.extra
    clipped = surrogate.column(surrogate.trust.full - surrogate.trust.weight, advantage)
    policy, state = _regularised(policy, surrogate, recipe, state, meter)
    entropy, state = _entropy_terms(surrogate, recipe, state, meter)
    value_grad = value_share = None
    if (returns := surrogate.advantage.returns) is not None:
        value_grad, value_share, loss = value_loss(tokens, returns, recipe.gae)
        if need.median:
            value_grad = with_median(tokens, returns, value_grad, value_share)
        _measure_critic(meter, returns, loss)

    if columns.turn_pass is not None:
        now = updated_now(tokens, recipe, columns.turn_pass)
        policy, clipped = policy * now, clipped * now
        entropy = None if entropy is None else entropy * now
        if value_grad is not None and value_share is not None:
            value_grad, value_share = value_grad * now, value_share * now
    ess, state = effective_sample_size(tokens, recipe.ess, state)
    factors = {"ess_scale": ess.scale} if recipe.ess.scale != "none" else {}
    size = scalar_size(tokens, keep, surrogate.trust.full, surrogate.trust.weight, advantage)
    kappa, state = _free_kappa(surrogate, recipe, state, size.cut, size.used, clipped, policy)
    if kappa is not None:
        factors["kappa"] = kappa

    measure_ess(meter, ess)
    meter.put("ess/token", _token_ess(tokens))
    meter.put("lr/ess_scale", ess.scale)
    meter.put("lr/kappa", 1.0 if kappa is None else kappa)
    meter.put("clip/bias", size.cut / size.full.clamp(min=torch.finfo(size.full.dtype).tiny))
    meter.put("clip/bias_size", size.cut)
    cap = log(recipe.trust.cap) if recipe.trust.rule == "truncate" else None
    measure_ratios(meter, tokens, cap)
    measure_lag(meter, tokens)
    measure_trust(meter, tokens, surrogate.trust, keep, advantage)
    measure_selection(meter, tokens, surrogate.selection)
    measure_outcome(meter, tokens)
    measure_signal(meter, tokens, advantage, surrogate.advantage.zero_signal)
    measure_teacher(meter, tokens)

    metrics = without_empty_buckets(meter.read())
    if recipe.controller:
        state = controlled(written, state, metrics)
        metrics |= {f"controlled/{number}": now.value for number, now in state.controlled.items()}
    dtype = columns.log_prob.dtype
    result = Coefficients(
        policy=policy.to(dtype),
        baseline=None if baseline is None else baseline.to(dtype),
        entropy=None if entropy is None else entropy.to(dtype),
        value_grad=None if value_grad is None else value_grad.to(dtype),
        value_target=None if returns is None else returns.target.to(dtype),
        value_share=None if value_share is None else value_share.to(dtype),
        clipped=clipped.to(dtype) if need.clipping_bias_norm else None,
        learning_rate_factors=factors,
        skip=_nothing_left(surrogate, [policy, baseline, entropy]),
        metrics=metrics,
    )
    return result, state


@torch.no_grad()
def opob_baselines(norm_squares: Tensor, columns: Columns, recipe: Recipe, state: ObjectiveState) -> Tensor:
    """Exact OPOB: the baseline of each group, from per-trajectory squared gradient norms.

    norm_squares: [I], |sum_t baseline[t] grad log pi_t|^2 with the `baseline` column of the coefficients of these
    columns. state: the one that `coefficients` was given, whose beta is in the rewards. Returns b [G]: the step's
    gradient is sum(policy * grad) - sum_groups b_g * sum(baseline * grad).
    """
    if recipe.schedule or recipe.controller:
        recipe = recipe_at(recipe, columns.current_version, state)
    surrogate = _surrogate(columns, recipe, state)
    opob = surrogate.advantage.opob
    assert opob is not None, "the recipe has no OPOB"
    assert surrogate.advantage.unit is not None
    column = surrogate.column(surrogate.trust.weight, surrogate.advantage.unit)
    log_weight = log_opob_weight(norm_squares.double().log(), column, surrogate.trust.weight, surrogate.tokens, recipe)
    baseline, _ = optimal_baseline(log_weight, opob, surrogate.tokens, recipe)
    return baseline.to(norm_squares.dtype)


def finish(
    recipe: Recipe, state: ObjectiveState, *, gradient_norm: float, clipped_norm: float
) -> tuple[Mapping[str, float], ObjectiveState, Mapping[str, float]]:
    """What is known only after the backward pass: kappa from exact gradient norms.

    gradient_norm: norm of sum(policy * grad) (with its baseline), before gradient clipping
    clipped_norm: norm of sum(clipped * grad)
    Returns further learning-rate factors, the new state, and metrics. Call it where
    `requirements(recipe).clipping_bias_norm`, on the state that `coefficients` returned.
    """
    kappa, state = kappa_of(clipped_norm, gradient_norm, recipe.bias, state)
    whole = gradient_norm + clipped_norm
    metrics = {"lr/kappa": kappa, "clip/bias_size": clipped_norm}
    metrics["clip/bias"] = clipped_norm / whole if whole > 0 else 0.0
    return {"kappa": kappa}, state, metrics


def _surrogate(columns: Columns, recipe: Recipe, state: ObjectiveState) -> Surrogate:
    """Clean, ratio, advantage, trust rule, selection, shares."""
    tokens = tokens_of(columns, recipe, requirements(recipe))
    ratio = ratio_of(tokens, recipe.ratio)
    penalty = kl_penalty(tokens, recipe, state) if has_kl(recipe) else None
    compared = tokens
    if recipe.reward != PLAIN.reward:
        compared = replace(tokens, reward=shaped_reward(tokens, recipe.reward))
    surplus: Tensor | None = None
    if recipe.select.keep_in_group > 0:
        surplus = ~kept_in_groups(compared, compared.reward, recipe.select)
        compared = replace(compared, compared=compared.compared & ~surplus)
    advantage = advantage_of(compared, recipe, penalty)
    if columns.reused is not None:
        own = reused_advantage(tokens, advantage.per_token, compared.reward, recipe)
        advantage = replace(advantage, per_token=own)
    if recipe.shape.clarity != 0:
        advantage = replace(advantage, per_token=shaped_advantage(tokens, advantage.per_token, recipe.shape))
    if recipe.shape != PLAIN.shape:
        advantage = replace(advantage, per_token=modulated(tokens, ratio, advantage.per_token, recipe.shape))
    if recipe.teaching.coefficient > 0:
        advantage = replace(advantage, per_token=taught(tokens, advantage.per_token, recipe.teaching))
    rule = trust(compared, ratio, advantage.per_token, recipe)
    selection = select(tokens, recipe, advantage.per_token, advantage.zero_signal)
    if surplus is not None:
        selection = selection.without("surplus", surplus)
    counted = torch.ones_like(selection.keep)
    if columns.reused is not None:
        rule, selection = demonstrated(tokens, rule, recipe.reuse), selected(selection, tokens, recipe.reuse)
        counted = columns.reused.in_policy_term(recipe.reuse) & ~columns.reused.out
    if recipe.select.denominator == "kept":
        counted = counted & selection.keep
    share = shares(tokens, counted, recipe.aggregate) * selection.keep[tokens.trajectory]
    if columns.reused is not None:
        share = share * policy_share(tokens, recipe)
    base = share * correction_weight(tokens, recipe)
    if recipe.policy_weight != 1:
        base = base * recipe.policy_weight
    if recipe.mask != PLAIN.mask:
        base = base * mask(tokens, advantage.per_token, recipe.mask)
    if recipe.shape != PLAIN.shape and recipe.shape.clarity == 0:
        base = base * factor(tokens, recipe.shape)
    if recipe.trust.rule == "none" and recipe.trust.loss_weight != 1:
        base = base * recipe.trust.loss_weight
    if columns.turn_pass is not None and recipe.turn_order != "together":
        base = base * weight_of_updated(tokens, ratio, recipe.turn_order, columns.turn_pass)
    if recipe.bias.kappa == "per_trajectory":
        kappa = kappa_per_trajectory(tokens, rule.full, rule.weight, rule.advantage, recipe.bias)
        base = base * kappa[tokens.trajectory]
    return Surrogate(tokens=tokens, ratio=ratio, advantage=advantage, trust=rule, selection=selection,
                     share=share, base=base, penalty=penalty)  # fmt: skip


def _baselined(surrogate: Surrogate, recipe: Recipe, meter: Meter) -> tuple[Tensor, Tensor | None]:
    """The advantage [T] with OPOB's baseline subtracted, and the `baseline` column [T] when the trainer has to find it.

    With exact norms the advantage returned uses the length estimate: for metrics and kappa only.
    """
    advantage, opob = surrogate.advantage, surrogate.advantage.opob
    if opob is None:
        return surrogate.trust.advantage, None
    assert advantage.unit is not None
    tokens = surrogate.tokens
    column = surrogate.column(surrogate.trust.weight, advantage.unit)
    norm = "length" if recipe.opob.norm == "exact" else recipe.opob.norm
    log_norm = proxy_log_norm_square(column, tokens, norm)
    log_weight = log_opob_weight(log_norm, column, surrogate.trust.weight, tokens, recipe)
    baseline, largest = optimal_baseline(log_weight, opob, tokens, recipe)
    if tokens.num_groups:
        meter.put("opob/baseline", baseline.mean())
        meter.put("opob/max_weight_share", largest.mean())
    per_token = advantage.per_token - baseline[tokens.group] * advantage.unit
    return per_token, column if recipe.opob.norm == "exact" else None


def _policy_advantage(surrogate: Surrogate, recipe: Recipe, advantage: Tensor) -> Tensor:
    """What the `policy` column holds, [T]: the advantage, or the reward's part before an exact baseline."""
    if surrogate.advantage.opob is not None and recipe.opob.norm == "exact":
        return surrogate.advantage.per_token
    return advantage


def _entropy_terms(
    surrogate: Surrogate, recipe: Recipe, state: ObjectiveState, meter: Meter
) -> tuple[Tensor | None, ObjectiveState]:
    """Coefficients of the entropies, [T]: the bonus, and the pull back into the band around their past mean."""
    tokens, share = surrogate.tokens, surrogate.share
    bonus = share * recipe.entropy if recipe.entropy else None
    if recipe.band.weight == 0:
        return bonus, state
    assert tokens.entropy is not None
    ok = tokens.finite[tokens.trajectory]
    if not bool(ok.any()):
        return bonus, state
    if state.entropy is not None:
        outside = distance(tokens.entropy, state.entropy.mean, recipe.band)
        meter.put("band/outside", mean_of((outside != 0).double(), ok))
        pull = -2 * recipe.band.weight * share * outside
        bonus = pull if bonus is None else bonus + pull
    past = state.entropy or Past(mean=0.0, updates=0)
    return bonus, replace(state, entropy=past.plus(float(mean_of(tokens.entropy, ok))))


def _regularised(
    policy: Tensor, surrogate: Surrogate, recipe: Recipe, state: ObjectiveState, meter: Meter
) -> tuple[Tensor, ObjectiveState]:
    """Add the KL and positive-example terms to the policy column [T]; adapt beta."""
    tokens = surrogate.tokens
    if recipe.positive_nll:
        correct = ((tokens.reward > 0) & surrogate.selection.keep)[tokens.trajectory].to(policy.dtype)
        policy = policy + recipe.positive_nll * correct / correct.sum().clamp(min=1.0)
    if tokens.columns.reused is not None:
        added, measured_back = imitation(tokens, surrogate.advantage.per_token, recipe)
        policy = policy + added
        for name, of_back in measured_back.items():
            meter.put(name, of_back)
    for number, kl, beta in kl_now(recipe, state) if has_kl(recipe) else ():
        value, slope = kl_loss(tokens, kl, surrogate.advantage.per_token)
        ok = tokens.finite[tokens.trajectory]
        measured = float(torch.where(ok, value, 0.0).sum() / ok.sum().clamp(min=1))
        if kl.allowance > 0:
            beta *= max(0.0, measured - kl.allowance)
        if kl.place == "loss":
            share = surrogate.share if kl.weighting == "policy" else ok.to(slope.dtype) / ok.sum().clamp(min=1)
            policy = policy - share * beta * slope
        name = "kl" if number == 0 else f"kl/more{number}"
        meter.put(f"{name}/regulariser", measured)
        meter.put(f"{name}/coefficient", beta)
        if number == 0:
            state = adapted(measured, tokens, recipe, state)
    return policy, state


def _free_kappa(
    surrogate: Surrogate, recipe: Recipe, state: ObjectiveState,
    cut: Tensor, used: Tensor, clipped: Tensor, policy: Tensor,
) -> tuple[float | None, ObjectiveState]:  # fmt: skip
    """kappa by an estimator that needs no backward pass; None when the recipe has none here. clipped, policy [T]."""
    if recipe.bias.kappa in ("none", "per_trajectory") or recipe.bias.estimator == "exact":
        return None, state
    if recipe.bias.estimator == "logit":
        cut, used = logit_size(surrogate.tokens, clipped), logit_size(surrogate.tokens, policy)
    return kappa_of(float(cut), float(used), recipe.bias, state)


def _token_ess(tokens: Tokens) -> float:
    """ESS / T with one importance weight a token."""
    ok = tokens.readable[tokens.trajectory]
    log_weight = torch.where(ok, tokens.log_prob - tokens.log_behaviour, torch.nan)
    return ess_ratio(log_weight if tokens.weighted is None else log_weight[tokens.weighted[tokens.trajectory]])


def _measure_critic(meter: Meter, returns: Returns, loss: Tensor) -> None:
    """value/*: loss [], mean and explained variance of the critic."""
    predicted, target = returns.measured
    meter.put("value/loss", loss)
    if len(target):
        meter.put("value/mean", predicted.mean())
        spread = target.var(correction=0)
        left = (target - predicted).var(correction=0)
        meter.put("value/explained_variance", torch.where(spread > 0, 1 - left / spread, 0.0))


def _nothing_left(surrogate: Surrogate, parts: list[Tensor | None]) -> str:
    """Why the policy's step must be skipped, or empty. parts: columns [T].

    A gradient of zero would still move weights through Adam's moments. The critic may have something to learn all the
    same.
    """
    if any(part is not None and bool((part != 0).any()) for part in parts):
        return ""
    tokens = surrogate.tokens
    if tokens.num_tokens == 0:
        return "the batch has no policy token"
    if not bool((surrogate.selection.keep & (tokens.length > 0)).any()):
        counts = {name: int(mask.sum()) for name, mask in surrogate.selection.rejected.items()}
        return "every trajectory was rejected: " + ", ".join(f"{n} {c}" for n, c in counts.items() if c)
    return "every coefficient is zero: equal rewards within every group, or every token clipped"


# Aggregation: how token losses become one number.


def shares(tokens: Tokens, counted: Tensor, settings: AggregateSettings) -> Tensor:
    """Weight of each token's loss, [T] (docs/algorithms.md#aggregation). counted [I] bool: those in the denominators.

    Denominators are of the whole batch. Trajectories without policy tokens are in none.
    """
    inside = counted & (tokens.length > 0)
    length = tokens.length.clamp(min=1.0)
    sequences = inside.sum().clamp(min=1).to(length.dtype)
    match settings.mode:
        case "token_mean":
            total = (tokens.length * inside).sum().clamp(min=1.0)
            share = (1 / total).expand(tokens.num_trajectories)
        case "seq_mean_token_mean":
            share = 1 / (sequences * length)
        case "seq_mean_token_sum":
            share = (1 / sequences).expand(tokens.num_trajectories)
        case "constant":
            share = (1 / (sequences * settings.constant)).expand(tokens.num_trajectories)
        case "group_mean_token_sum":
            groups = (tokens.sum_group(inside.double()) > 0).sum().clamp(min=1).to(length.dtype)
            share = (1 / groups).expand(tokens.num_trajectories)
        case "group_mean_token_mean":
            per_group = tokens.sum_group(tokens.length * inside)
            groups = (per_group > 0).sum().clamp(min=1)
            share = (1 / (groups * per_group.clamp(min=1.0)))[tokens.group_of_trajectory]
        case "turn_mean":
            turns = inside[tokens.trajectory_of_turn].sum().clamp(min=1)
            return (1 / (turns * tokens.turn_length))[tokens.turn]
        case "seq_mean_turn_mean":
            ones = torch.ones_like(tokens.turn_length)
            turns = segment_sum(ones, tokens.trajectory_of_turn, tokens.num_trajectories).clamp(min=1.0)
            per_turn = sequences * turns[tokens.trajectory_of_turn] * tokens.turn_length
            return (1 / per_turn)[tokens.turn]
    return share[tokens.trajectory]
