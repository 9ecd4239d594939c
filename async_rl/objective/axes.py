"""The axes of an objective and what can be chosen on each. Plain settings, no behaviour.

What they mean in formulas: docs/algorithms.md#coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting

Level = Literal["token", "turn", "sequence"]
Pool = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSettings:
    denominator: Literal["behaviour", "proximal", "proximal_loglinear", "mixture", "reference", "group_expected"] = (
        setting(
            "behaviour",
            "policy under the ratio: behaviour (recorded per token by the generator); proximal (recomputed at "
            "the start of the step; needs several updates a batch); proximal_loglinear (approximated from the "
            "token's version, no forward pass); mixture (behaviour and current); reference; group_expected (GEPO: the "
            "probability that the behaviour policy expects of an answer of the group)",
        )
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
    clamp: float = setting(
        20.0, "log-ratios are clamped to plus and minus this before exp; no gradient beyond", unit="nats", above=0
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
        "sat",
        "bapo",
        "aspo",
        "cpgd",
        "sapo",
        "vespo",
        "gbpo",
        "bpo",
        "regress",
        "disco",
        "mix_ppo",
        "dcpo",
        "real",
    ] = setting(
        "ppo",
        "what becomes of a token whose ratio is far from 1. Three put another objective in the place of the policy "
        "gradient: regress, log-ratios on rewards (GVPO, CoPG, REBEL); disco, right answers against wrong ones; real, "
        "log-ratios that tell right answers from wrong ones (REAL)",
    )
    gradient: Literal["unit", "token"] = setting(
        "unit",
        "where the ratio carries the gradient (none, ppo): unit differentiates the pooled ratio (GSPO, "
        "Turn-PPO), token holds it fixed and differentiates each token (GSPO-token). The same at token level",
    )
    clip_low: float = setting(
        0.2,
        "ppo, cispo, gmpo, clip_cov, sat, aspo, cpgd, gbpo: lower bound is 1 - clip_low (gmpo: log; mix_ppo: that of "
        "the policy at the start of the step, less this)",
    )
    clip_high: float = setting(
        0.2, "ppo, cispo, gmpo, clip_cov, sat, aspo, cpgd, gbpo: upper bound is 1 + clip_high (gmpo: log)"
    )
    beyond_low: float = setting(
        0.0, "ppo, A < 0: share of the lower bound that a token below it keeps as its weight (CE-GPPO: 0.75)", min=0
    )
    beyond_high: float = setting(
        0.0, "ppo, A > 0: share of the upper bound that a token above it keeps as its weight (CE-GPPO: 1)", min=0
    )
    dual_clip: float = setting(0.0, "ppo, sat, bapo: ratio above which negative advantages stop too; 0 is off")
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
    covariance_of: Literal["all", "replayed"] = setting(
        "all", "clip_cov: which tokens are candidates; replayed: those of the experience pool's rows alone (SPEAR)"
    )
    covariance_penalty: float = setting(1.0, "kl_cov: weight of |log-ratio| on the treated tokens")
    seed: int = setting(0, "clip_cov: seed of the choice among the candidates, together with the version")
    quantile: float = setting(
        0.9, "sat: share of the batch's tokens, those with the smallest |log-ratio|, that keep the whole interval",
        min=0, max=1,
    )  # fmt: skip
    contraction: Literal["from_gate", "from_zero"] = setting(
        "from_gate",
        "sat: how the bound of the other tokens contracts with q the gate: 1 / (1 + ((|d| - q) / q)^2), or "
        "1 / (1 + (|d| / q)^2), which jumps to a half at the gate",
    )
    balance: float = setting(0.5, "bapo: smallest ratio of the positive to the negative tokens' loss", above=0)
    low_start: float = setting(0.6, "bapo: lower bound of the ratio that the search begins with")
    low_end: float = setting(0.8, "bapo: and the highest that it tries")
    high_start: float = setting(1.2, "bapo: upper bound of the ratio that the search begins with")
    high_end: float = setting(2.0, "bapo: and the highest that it tries")
    bound_step: float = setting(0.05, "bapo: step of the search", above=0)
    inverse_cap: float = setting(3.0, "aspo: largest weight, of the inverted ratio and of the ratio", above=0)
    uncertain_share: float = setting(
        0.0,
        "ppo, aspo: share of a trajectory's tokens, those of the highest entropy, that have uncertain_clip",
        min=0,
        max=1,
    )
    uncertain_clip: float = setting(0.4, "ppo, aspo: clip_low and clip_high of the tokens of uncertain_share", min=0)
    gate_positive: float = setting(1.0, "sapo, A > 0: steepness of the gate", above=0)
    gate_negative: float = setting(1.05, "sapo, A <= 0: steepness of the gate", above=0)
    power_positive: float = setting(2.0, "vespo, A >= 0: power of the weight")
    decay_positive: float = setting(3.0, "vespo, A >= 0: exponential decay with the weight", min=0)
    power_negative: float = setting(3.0, "vespo, A < 0: power of the weight")
    decay_negative: float = setting(2.0, "vespo, A < 0: exponential decay with the weight", min=0)
    target_temperature: float = setting(
        1e-4, "gbpo, bpo: how gradually the target ratio goes from the lower to the upper bound", above=0
    )
    beta: float = setting(0.1, "regress: what log-ratios are multiplied with before they are compared with rewards")
    regression: Literal["group", "absolute"] = setting(
        "group",
        "regress: group: centred log-ratios on advantages, loss_weight / 2 sum (...)^2 / (n - 1); absolute: "
        "loss_weight / 2 (...)^2 of each trajectory (A*-PO)",
    )
    loss_weight: float = setting(
        1.0,
        "none, regress: factor of the loss. In a group 1 is GVPO's; 2 is the mean over pairs (CoPG), 4 REBEL's; with "
        "rule none 2 beta is OREO's",
        above=0,
    )
    score_temperature: float = setting(
        10.0, "disco: tau of the soft maximum over wrong answers. real: what mean log-ratios are divided by", above=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings:
    """Detached weight pi_proximal / mu in front of a surrogate whose own ratio starts at the proximal policy (decoupled
    PPO, rollout correction), or at a reference that follows the policy (PPO-EWMA). Refused with the behaviour
    denominator: counted twice."""

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
    drop_flag: str = setting(
        "",
        "reject trajectories that the task marked with a note of this name other than 0: on the episode, on any of its "
        "turns or on a token (SimpleTIR: a void turn)",
    )
    drop_equal_rewards: bool = setting(
        False, "reject groups whose rewards are all equal, as they came from the task (DAPO, Reinforce-Rej)"
    )
    group_low: float = setting(0.0, "reject groups whose mean reward is below, e.g. 0.2 (PRIME)")
    group_high: float = setting(0.0, "reject groups whose mean reward is above, e.g. 0.8 (PRIME)")
    largest_share: float = setting(
        1.0, "share of the batch's trajectories that stay: those with the largest |advantage| (CPPO)", above=0, max=1
    )
    keep_in_group: int = setting(
        0, "trajectories of each group that stay; means and stds are taken over those alone; 0: all",
        unit="trajectories", min=0,
    )  # fmt: skip
    keep_by: Literal["shortest", "efficient", "variance"] = setting(
        "shortest",
        "keep_in_group: the shortest; those with the largest reward per token (GFPO); or the highest and lowest "
        "rewards, as many of each as gives the largest variance (PODS)",
    )
    deviating_share: float = setting(
        1.0, "share of the groups that stay: those with the largest std of rewards (StarPO-S: 0.25)", above=0, max=1
    )
    before_forward: bool = setting(
        False,
        "largest_share, keep_in_group: the others are left out before the forward pass, which they then cost nothing "
        "of",
    )
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
    credit: Literal[
        "trajectory",
        "turn_return",
        "turn_group",
        "gigpo",
        "token_return",
        "token_gae",
        "turn_gae",
        "turn_q",
        "path_mean",
        "segment_gain",
        "tree_gain",
        "bilevel_gae",
    ] = setting(
        "trajectory",
        "what gets a value of its own: trajectory (the outcome); turn_return (discounted return of each turn); "
        "turn_group (turn reward against the same turn of the group, plus outcome); gigpo (outcome plus return "
        "against the same environment state); token_return; token_gae, turn_gae (critic); turn_q (a critic with Q "
        "heads for turns: ArCHer); path_mean, segment_gain (answers that fork from one another: mean advantage of "
        "those that go through a token, ARPO; change of value along a segment, SPO; that and the change since the "
        "prompt, by the root of the answers ahead, TreeRL); bilevel_gae (critic: over turns, and from each turn's end "
        "back over its tokens: VAGEN)",
    )
    baseline: Literal[
        "none",
        "group_mean",
        "leave_one_out",
        "length_weighted",
        "virtual_max",
        "opob",
        "noted",
        "distinct_mean",
        "greedy",
        "quantile",
        "soft_mean",
    ] = setting(
        "group_mean",
        "what is subtracted: mean of the group; mean of the others; length-weighted mean (OPO); mean with a "
        "virtual best sample (NGRPO); off-policy optimal baseline (VCPO); a number that the task noted (A*-PO); mean "
        "of the values that occur, each counted once (MARS); reward of the group's greedy sample (ReMax); "
        "a quantile of the group (QAE); t log mean exp(R / t) (OAPL)",
    )
    quantile: float = setting(
        0.4, "baseline quantile: the smallest reward that this share of the group does not exceed", above=0, max=1
    )
    soft_temperature: float = setting(1.0, "baseline soft_mean: t", above=0)
    baseline_shift: float = setting(0.0, "added to the baseline; below 0 right answers weigh more (AsymRE: -0.1)")
    trees: Literal["together", "both"] = setting(
        "together",
        "path_mean: answers are compared within their group; or the advantage among those that begin with the same "
        "root is added (Tree-GRPO)",
    )
    equal: Literal["nothing", "sign", "entropy"] = setting(
        "nothing",
        "advantage in groups of equal rewards: nothing; sign: equal_weight where the reward is positive, else its "
        "negative (AGPO); entropy: equal_weight times H of the token, else H less the answer's largest (RL-ZVP)",
    )
    equal_weight: float = setting(0.1, "equal: size", above=0)
    among: Literal["group", "batch"] = setting(
        "group", "turn_return: the turns that are compared (of each agent): those of the group, or of the batch (MARS)"
    )
    turns: Literal["returns", "rewards"] = setting(
        "returns",
        "turn_return: what is compared and scaled: the returns of turns; or their rewards, of which the returns are "
        "made afterwards (IGPO)",
    )
    note: str = setting("", "baseline noted: name of the note, e.g. the value of the problem under the first model")
    parts: Literal["sum", "each"] = setting(
        "sum",
        "sum: the reward as the task's parts were weighed; each: every named part is compared and scaled by itself, "
        "then weighed by task.reward_weights (GDPO)",
    )
    scale: Literal["none", "group_std", "group_mean", "batch_std", "mixed", "beta"] = setting(
        "group_std",
        "what divides: nothing, std of the group's rewards, their mean (MaxRL), std of the batch; mixed: std and "
        "mean, the mean the more the surer the group (MAPO); beta: density of a Beta distribution at their mean (BNPO)",
    )
    std: Literal["sample", "population"] = setting("sample", "divisor of the variance: n - 1 or n")
    std_epsilon: float = setting(1e-6, "added to the std")
    whiten: bool = setting(
        False, "afterwards subtract the mean over the batch's tokens and divide by their std (sample)"
    )
    whiten_trajectories: bool = setting(
        False, "the same over the batch's trajectories, of which each has one advantage (GDPO)"
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
    turn_discount: float = setting(1.0, "bilevel_gae: gamma from turn to turn", above=0, max=1)
    bootstrap_truncated: bool = setting(
        False, "a truncated trajectory goes on with its last value instead of ending at 0 (T-PPO)"
    )
    value_clip: float = setting(0.0, "bound on the value's move in one step in the loss; 0 is off")
    value_finished_only: bool = setting(False, "no value loss on truncated trajectories (T-PPO)")
    value_earlier: bool = setting(
        False,
        "with rollout.window: the last piece of an episode trains the critic on the tokens of the earlier pieces, too "
        "(T-PPO)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSettings:
    coefficient: float = setting(0.0, "beta; 0 is off")
    target: Literal["reference", "behaviour", "proximal", "proxy"] = setting(
        "reference",
        "KL of the policy to this; proxy: the policy at the start of the step without its improbable tokens (Lp-Reg)",
    )
    proxy_share: float = setting(
        0.02, "proxy: it keeps tokens of at least this share of the likeliest token's probability", above=0, below=1
    )
    tokens: Literal["all", "protected"] = setting(
        "all",
        "tokens that have the KL; protected: those of negative advantage that are among the batch's least likely "
        "(protected_share) and likelier under the target",
    )
    protected_share: float = setting(0.01, "protected: share of the batch's tokens, the least likely", above=0, max=1)
    recent: float = setting(
        0.0,
        "share of the KL in the loss that is to the policy at the start of the step instead (ReMix); needs several "
        "updates a batch",
        min=0,
        max=1,
    )
    place: Literal["loss", "reward"] = setting("loss", "a term of the loss, or subtracted from rewards (k1)")
    taken_at: Literal["step", "update"] = setting(
        "step", "place=reward: under the weights at the start of the step, or at each of its updates"
    )
    estimator: Literal["k1", "k2", "k3", "forward", "chi2"] = setting(
        "k3",
        "x = log pi - log target: x, x^2/2, e^-x + x - 1, e^x - 1 - x (KL of the target to the policy), (e^x - 1)^2",
    )
    largest_slope: float = setting(
        0.0, "bound on the derivative of a token's KL from above (CPGD: 1); 0 is off", unit="of 1 a nat", min=0
    )
    allowance: float = setting(
        0.0,
        "delta: the coefficient is times max(0, KL - delta) of the batch, so the KL below it is free (DisCO); 0 is off",
        unit="nats",
        min=0,
    )
    weighting: Literal["policy", "token_mean"] = setting(
        "policy", "share of a token's KL in the loss: that of its policy term, or of the mean over the batch's tokens"
    )
    certain_share: float = setting(
        1.0, "share of a trajectory's tokens, those of the lowest entropy, that have the KL (ASPO: 0.8)", above=0, max=1
    )
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
class TeachingSettings:
    """Distillation from the run's teachers (`teachers`): their log-probs of the tokens that the policy sampled."""

    coefficient: float = setting(
        0.0, "times log q - log pi of a token, q the teacher's, is added to its advantage; 0 is off", min=0
    )
    largest: float = setting(0.0, "bound on |log q - log pi|; 0 is off", unit="nats", min=0)
    discount: float = setting(
        0.0, "a token is credited with the later ones' terms too, discounted by this", min=0, max=1
    )
    alone: bool = setting(
        False, "rewards count for nothing (on-policy distillation); trajectories without a teacher are left out"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseSettings:
    """What becomes of rows of the experience pool (`pool`): replayed ones, which have a behaviour policy of their own,
    and demonstrations, which have none."""

    replayed: Literal["policy", "none"] = setting(
        "policy", "replayed rows in the policy gradient: like fresh ones, each with its own mu; or not at all"
    )
    weight: float = setting(1.0, "factor of their policy gradient, which a schedule may move (SPEAR)", min=0)
    advantage: Literal["group", "stored", "recalibrated"] = setting(
        "group",
        "of replayed rows: within the group they are in; as it was when they were fresh (SSB); or reward less the "
        "median of the newest groups' means, by the median of their stds unless advantage.scale=none (SPEAR)",
    )
    positive_only: bool = setting(False, "rows of the pool whose advantage is below 0 have 0 instead (SPEAR)")
    statistics: Literal["all", "fresh"] = setting(
        "all", "over which rows of a group its mean and std are taken; fresh: the pool's stand against those (RL-PLUS)"
    )
    demonstrations: Literal["none", "ratio", "shaped", "mixture"] = setting(
        "none",
        "weight of a demonstration's token in the policy gradient, never clipped: none; pi; s pi / (pi + s)^2 (LUFFY); "
        "2 pi / (pi_old + (1 + pi_old) / 2), with pi_old at the start of the step (RL-PLUS)",
    )
    shape: float = setting(0.1, "demonstrations=shaped: s", above=0)
    focal: float = setting(
        0.0, "c: factor (1 - pi)^c on the policy gradient of demonstrations (RL-PLUS: 0.5); 0 is off", min=0
    )
    nll: float = setting(0.0, "weight of the mean of -log pi over the demonstrations' tokens (HPT); 0 is off", min=0)
    nll_weight: Literal["equal", "certainty", "uncertainty", "probability"] = setting(
        "equal",
        "nll: weight of a token: 1; exp of minus the mean entropy of the demonstrations' tokens (SRFT); pi (1 - pi) "
        "(CHORD); pi (DFT)",
    )
    demonstration_advantage: Literal["own", "standardised"] = setting(
        "own",
        "of demonstrations: as that of fresh rows is formed; or their reward standardised among all of their group "
        "(SRFT)",
    )
    self_imitation: float = setting(
        0.0, "weight of the mean of -max(A, 0) log pi over the tokens of replayed rows; 0 is off", min=0
    )


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
        "group_mean_token_sum",
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
