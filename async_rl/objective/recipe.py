"""A recipe: one choice on every axis of the objective. Plain settings, no behaviour.

What the axes mean in formulas: docs/algorithms.md#coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from async_rl.config.schema import setting
from async_rl.objective.own import is_own_function, load_own_function

Level = Literal["token", "turn", "sequence"]
Pool = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSettings:
    denominator: Literal["behaviour", "proximal", "proximal_loglinear", "mixture", "reference"] = setting(
        "behaviour",
        "policy under the ratio: behaviour (recorded per token by the generator); proximal (recomputed at "
        "the start of the step; needs several updates a batch); proximal_loglinear (approximated from the "
        "token's version, no forward pass); mixture (behaviour and current); reference",
    )
    level: Literal["none", "token", "turn", "sequence"] = setting(
        "token", "what shares one ratio; none is a ratio of 1 (plain REINFORCE)"
    )
    pool: Pool = setting(
        "mean", "log-ratio of a turn or sequence: mean of its tokens' (geometric mean) or sum (true ratio)"
    )
    mixture_weight: float = setting(
        0.5, "share of the current policy in the mixture denominator; bounds the ratio by 1 / share"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustSettings:
    rule: Literal[
        "none",
        "ppo",
        "truncate",
        "interval",
        "cispo",
        "dispo",
        "topr",
        "damp",
        "dppo",
        "gmpo",
        "m2po",
        "m2po_all",
        "clip_cov",
        "kl_cov",
    ] = setting("ppo", "what becomes of a token whose ratio is far from 1")
    gradient: Literal["unit", "token"] = setting(
        "unit",
        "where the ratio carries the gradient (none, ppo): unit differentiates the pooled ratio (GSPO, "
        "Turn-PPO), token holds it fixed and differentiates each token (GSPO-token). The same at token level",
    )
    clip_low: float = setting(0.2, "ppo, cispo, gmpo, clip_cov: lower bound is 1 - clip_low (gmpo: log)")
    clip_high: float = setting(0.2, "ppo, cispo, gmpo, clip_cov: upper bound is 1 + clip_high (gmpo: log)")
    dual_clip: float = setting(0.0, "ppo: ratio above which negative advantages stop too; 0 is off")
    cap: float = setting(8.0, "truncate: largest weight. topr: largest weight of negatives, 1 in the paper")
    low: float = setting(0.5, "interval: smallest ratio that keeps its weight")
    high: float = setting(2.0, "interval: largest ratio that keeps its weight")
    positive_low: float = setting(0.2, "dispo, A > 0: lower bound of the weight is 1 - this")
    positive_high: float = setting(10.0, "dispo, A > 0: upper bound of the weight is 1 + this")
    negative_low: float = setting(1.0, "dispo, A < 0: lower bound of the weight is 1 - this")
    negative_high: float = setting(100.0, "dispo, A < 0: upper bound of the weight is 1 + this")
    divergence: Literal["probability", "binary_kl"] = setting(
        "probability", "dppo: distance on the sampled token: |pi - mu|, or KL(mu || pi) of this token or another"
    )
    mask_low: float = setting(0.2, "dppo, A <= 0: dropped when the probability fell by more than this")
    mask_high: float = setting(0.2, "dppo, A > 0: dropped when the probability rose by more than this")
    second_moment: float = setting(
        0.04,
        "m2po: largest mean of the squared log-ratios of the trust-region tokens kept (A > 0 and ratio > 1, or A < 0 "
        "and ratio < 1; the others are never masked). m2po_all: of all tokens kept, whatever their advantage",
    )
    covariance_low: float = setting(1.0, "clip_cov: smallest covariance of a candidate")
    covariance_high: float = setting(5.0, "clip_cov: largest covariance of a candidate")
    covariance_fraction: float = setting(2e-4, "clip_cov, kl_cov: share of the tokens that is treated")
    covariance_penalty: float = setting(1.0, "kl_cov: weight of |log-ratio| on the treated tokens")
    seed: int = setting(0, "clip_cov: seed of the choice among the candidates, together with the version")


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings:
    """Detached weight pi_proximal / mu in front of a surrogate whose own ratio starts at the proximal
    policy (decoupled PPO, rollout correction). Refused with the behaviour denominator: counted twice."""

    rule: Literal["none", "truncate", "interval"] = setting(
        "none", "none; truncate: min(weight, high); interval: 0 outside [low, high]"
    )
    level: Level = setting("token", "what shares one weight")
    pool: Pool = setting("sum", "how log-ratios of a turn or sequence are pooled")
    low: float = setting(0.0, "interval: smallest weight kept")
    high: float = setting(2.0, "largest weight")
    normalise: bool = setting(False, "divide by the mean weight over the batch's tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSettings:
    """Whole trajectories that are left out, each counted with its reason and length. Bounds act on the
    ratio to the behaviour policy (of the proximal policy where the denominator is proximal); 0 is off."""

    sequence_low: float = setting(0.0, "reject trajectories whose product of ratios is below")
    sequence_high: float = setting(0.0, "reject trajectories whose product of ratios is above")
    geometric_low: float = setting(0.0, "reject trajectories whose geometric mean ratio is below")
    geometric_high: float = setting(0.0, "reject trajectories whose geometric mean ratio is above")
    veto: float = setting(0.0, "reject trajectories with any token whose ratio is below, e.g. 1e-4")
    opsm: float = setting(
        0.0,
        "reject trajectories with negative advantage whose mean log(denominator / pi) is above (OPSM)",
        unit="nats",
    )
    drop_truncated: bool = setting(False, "reject trajectories ended by a token or turn limit")
    drop_zero_signal: bool = setting(
        False, "reject trajectories whose advantage is 0 on every token, e.g. groups of equal rewards"
    )
    denominator: Literal["all", "kept"] = setting(
        "all",
        "tokens and trajectories counted in the loss's denominators: all (a rejected one is a zero; the step "
        "shrinks) or kept (the rest share the step)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSettings:
    credit: Literal["trajectory", "turn_return", "turn_group", "gigpo", "token_return", "token_gae", "turn_gae"] = (
        setting(
            "trajectory",
            "what gets a value of its own: trajectory (the outcome); turn_return (discounted return of each "
            "turn); turn_group (turn reward against the same turn of the group, plus outcome); gigpo (outcome "
            "plus return against the same environment state); token_return; token_gae, turn_gae (critic)",
        )
    )
    baseline: Literal["none", "group_mean", "leave_one_out", "length_weighted", "virtual_max", "opob"] = setting(
        "group_mean",
        "what is subtracted: mean of the group; mean of the others; length-weighted mean (OPO); mean with a "
        "virtual best sample (NGRPO); off-policy optimal baseline (VCPO)",
    )
    scale: Literal["none", "group_std", "group_mean", "batch_std"] = setting(
        "group_std", "what divides: nothing, std of the group's rewards, their mean (MaxRL), std of the batch"
    )
    std: Literal["sample", "population"] = setting("sample", "divisor of the variance: n - 1 or n")
    std_epsilon: float = setting(1e-6, "added to the std")
    whiten: bool = setting(
        False, "afterwards subtract the mean over the batch's tokens and divide by their std (sample)"
    )
    discount: float = setting(1.0, "gamma: per turn (turn_return, gigpo, turn_gae) or token (token_*)")
    outcome_weight: float = setting(1.0, "turn_group, gigpo: weight of the outcome's group advantage")
    turn_weight: float = setting(1.0, "turn_group, gigpo: weight of the turn's advantage")
    reward_max: float = setting(1.0, "virtual_max: reward of the virtual sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpobSettings:
    """The baseline that minimises the second moment of the estimator: sum W R / sum W."""

    norm: Literal["exact", "logit", "length"] = setting(
        "exact",
        "squared gradient norm of a trajectory: exact (all parameters), logit (at the logits, from sums "
        "over the vocabulary), length (every token counts 1)",
    )
    weight: Literal["estimator", "paper", "reference_code"] = setting(
        "estimator",
        "W: estimator (squared norm of the gradient as it enters the step: the true minimiser), paper "
        "(untruncated w^2 times the norm of sum grad log pi), reference_code (both weights, as published)",
    )
    scope: Literal["group", "batch"] = setting("group", "one baseline per group, or one for the batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class GaeSettings:
    trace: float = setting(0.95, "lambda of the policy's advantage")
    critic_trace: float = setting(1.0, "lambda of the critic's target (1: Monte-Carlo return)")
    length_adaptive: float = setting(0.0, "alpha: lambda = 1 - 1 / max(1, alpha * length) (VAPO); 0 is off")
    bootstrap_truncated: bool = setting(
        False, "a truncated trajectory goes on with its last value instead of ending at 0 (T-PPO)"
    )
    value_clip: float = setting(0.0, "bound on the value's move in one step in the loss; 0 is off")
    value_finished_only: bool = setting(False, "no value loss on truncated trajectories (T-PPO)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSettings:
    coefficient: float = setting(0.0, "beta; 0 is off")
    target: Literal["reference", "behaviour", "proximal"] = setting("reference", "KL of the policy to this")
    place: Literal["loss", "reward"] = setting("loss", "a term of the loss, or subtracted from rewards (k1)")
    estimator: Literal["k1", "k2", "k3"] = setting("k3", "x = log pi - log target: x, x^2/2, e^-x + x - 1")
    gradient: Literal["own", "k2"] = setting(
        "own", "gradient of the estimator itself, or k2's (the unbiased one) whatever the value shown"
    )
    importance: Literal["none", "detached", "through"] = setting(
        "none",
        "token ratio pi / mu in front: none; detached (weight capped at 10); through (its gradient "
        "too: the unbiased KL off policy)",
    )
    adaptive_target: float = setting(0.0, "adapt beta so that the KL stays near this; 0 is fixed", unit="nats")
    adaptive_horizon: float = setting(10000.0, "how slowly beta adapts", unit="trajectories")


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateSettings:
    mode: Literal[
        "token_mean",
        "seq_mean_token_mean",
        "seq_mean_token_sum",
        "constant",
        "turn_mean",
        "seq_mean_turn_mean",
        "group_mean_token_mean",
    ] = setting("seq_mean_token_mean", "how token losses become one number; all counts are of the whole batch")
    constant: float = setting(
        1024.0, "constant: divisor of a trajectory's token sum (Dr. GRPO: the longest answer)", unit="tokens"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EssSettings:
    """Learning rate of this step times min(1, rho / reference) ^ (1/2 or 1); rho = ESS / B."""

    scale: Literal["none", "sqrt", "linear"] = setting("none", "sqrt is the rule for Adam (VCPO)")
    level: Level = setting("sequence", "what has one importance weight")
    pool: Pool = setting("sum", "log-weight of a turn or trajectory: sum (true ratio) or mean")
    reference: int | float | str = setting(
        "calibrated",
        "rho on fresh data: a number (1.0, VCPO's default; 0.55 in its multi-turn scripts) or calibrated, "
        "a running value by length; long answers have rho < 1 even on policy",
    )
    decay: float = setting(0.95, "calibrated: how much of the running value stays after a step with fresh data")
    floor: float = setting(
        0.5,
        "calibrated: the reference is never below this share of what the run's first fresh data would have at today's "
        "lengths, so that corrupt data cannot teach it to give them the full learning rate; 0: no floor",
        unit="share",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasSettings:
    """ST-PPO's clipping-bias correction: kappa from the size of what the trust rule cut away."""

    kappa: Literal["none", "guarded", "relative", "literal", "per_trajectory"] = setting(
        "none",
        "none; guarded: min(1, running size / size); relative: kept / (kept + strength * cut); literal: "
        "1 / size; per_trajectory: relative, on each trajectory's coefficients instead of the learning rate",
    )
    estimator: Literal["scalar", "logit", "exact"] = setting(
        "scalar", "size from mean |ratio * A| (free), at the logits, or of the gradient (one more backward)"
    )
    strength: float = setting(1.0, "lambda of relative and per_trajectory")
    decay: float = setting(0.9, "guarded: how much of the running size stays after a step that clipped")
    floor: float = setting(1e-12, "delta: smallest size divided by")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = setting("", "a recipe of `async-rl recipes`, file.py:function, module:function, or a YAML file of axes")
    ratio: RatioSettings = field(default_factory=RatioSettings)
    trust: TrustSettings = field(default_factory=TrustSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    select: SelectSettings = field(default_factory=SelectSettings)
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    opob: OpobSettings = field(default_factory=OpobSettings)
    gae: GaeSettings = field(default_factory=GaeSettings)
    kl: KlSettings = field(default_factory=KlSettings)
    entropy: float = setting(0.0, "weight of the entropy bonus; 0 is off")
    positive_nll: float = setting(
        0.0, "weight of the mean of -log pi over the tokens of trajectories with positive reward (VAPO); 0 is off"
    )
    aggregate: AggregateSettings = field(default_factory=AggregateSettings)
    ess: EssSettings = field(default_factory=EssSettings)
    bias: BiasSettings = field(default_factory=BiasSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """Columns and passes that a recipe needs; the trainer computes no others."""

    proximal: bool
    """`log_proximal`: log-probs under the weights at the start of the step"""
    reference: bool
    value: bool
    entropy: bool
    """the entropy's gradient, not only its value"""
    prob_square_sum: bool
    per_trajectory_norms: bool
    """squared gradient norms of the `baseline` column per trajectory (OPOB, exact)"""
    clipping_bias_norm: bool
    """gradient norms of the `clipped` and the `policy` column (kappa, exact)"""


@lru_cache(maxsize=256)  # asked for several times a step
def requirements(recipe: Recipe) -> Requirements:
    """What the trainer has to compute for `recipe`: what its axes need, and the columns that a function of the user's
    own asks for. Raises UserError when that function cannot be imported."""
    asked = load_own_function(recipe.name).needs if is_own_function(recipe.name) else frozenset()
    opob = recipe.advantage.baseline == "opob"
    kl = recipe.kl.coefficient != 0.0
    kappa = recipe.bias.kappa != "none"
    return Requirements(
        proximal=recipe.ratio.denominator == "proximal" or (kl and recipe.kl.target == "proximal"),
        reference=recipe.ratio.denominator == "reference"
        or (kl and recipe.kl.target == "reference")
        or "log_reference" in asked,
        value=recipe.advantage.credit in ("token_gae", "turn_gae") or "value" in asked,
        entropy=recipe.entropy != 0.0,
        prob_square_sum=(opob and recipe.opob.norm == "logit") or (kappa and recipe.bias.estimator == "logit"),
        per_trajectory_norms=opob and recipe.opob.norm == "exact",
        clipping_bias_norm=kappa and recipe.bias.estimator == "exact",
    )
