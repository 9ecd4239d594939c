"""A recipe: one choice on every axis of the objective (axes.py), and what the trainer computes for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from async_rl.config.schema import setting
from async_rl.objective.axes import (
    AdvantageSettings,
    AggregateSettings,
    BiasSettings,
    CorrectionSettings,
    EssSettings,
    GaeSettings,
    KlSettings,
    OpobSettings,
    RatioSettings,
    ReuseSettings,
    SelectSettings,
    TeachingSettings,
    TrustSettings,
)
from async_rl.objective.own import is_own_function, load_own_function
from async_rl.objective.reward_axes import RewardSettings
from async_rl.objective.shaping_axes import BandSettings, MaskSettings, ShapeSettings

Measured = Literal[
    "entropy", "kl/behaviour", "kl/regulariser", "teacher/kl", "reward/mean", "len/mean", "ess/ratio", "clip/frac"
]
"""metrics of an update that a controller can follow"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A number of the recipe that moves with the step."""

    number: str = setting("", "which one, e.g. kl.coefficient")
    start: float = setting(0.0, "its value until step `since`")
    end: float = setting(0.0, "its value from step `until` on")
    since: int = setting(0, "step", unit="steps", min=0)
    until: int = setting(0, "step", unit="steps", min=0)
    course: Literal["linear", "cosine", "exponential", "jump"] = setting(
        "linear", "between the two; exponential: like e^(-rate x) from 0 to 1; jump: `start` until `until`"
    )
    rate: float = setting(3.0, "exponential: how fast it begins", above=0)
    every: int = setting(
        0, "it changes every so many steps, to what it is at the end of them; 0: every step", unit="steps", min=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """A number of the recipe that follows what was measured: after each update it moves, within its bounds."""

    number: str = setting("", "which one, e.g. entropy; it begins with the recipe's value")
    metric: Measured = setting("entropy", "what is measured: the metric of this name of the update")
    target: float = setting(0.0, "where the metric should be, or what it has to pass (switch)")
    law: Literal["multiply", "add", "switch", "step"] = setting(
        "multiply",
        "multiply: times exp(rate clip((metric - target) / |target|, -1, 1)); add: plus rate (metric - target), as a "
        "multiplier of a bound does; switch: `then` for good when the metric has passed the target; step: plus rate "
        "where the metric is at most the target, else minus rate, and 0 while it is above (Skywork-OR1)",
    )
    rate: float = setting(
        0.1, "multiply, add, step: how fast; negative where the number should fall as the metric rises"
    )
    low: float = setting(0.0, "multiply, add, step: smallest value")
    high: float = setting(1e9, "multiply, add, step: largest value")
    then: float = setting(0.0, "switch: the value afterwards")
    side: Literal["above", "below"] = setting("above", "switch: the side of the target that counts as passed")
    hold: int = setting(1, "switch: updates in a row that the metric has to be there", unit="updates", min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    name: str = setting("", "a recipe of `async-rl recipes`, file.py:function, module:function, or a YAML file of axes")
    ratio: RatioSettings = field(default_factory=RatioSettings)
    trust: TrustSettings = field(default_factory=TrustSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    select: SelectSettings = field(default_factory=SelectSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    shape: ShapeSettings = field(default_factory=ShapeSettings)
    mask: MaskSettings = field(default_factory=MaskSettings)
    opob: OpobSettings = field(default_factory=OpobSettings)
    gae: GaeSettings = field(default_factory=GaeSettings)
    kl: KlSettings = field(default_factory=KlSettings)
    more_kl: tuple[KlSettings, ...] = setting((), "further KL terms, each with the settings of recipe.kl, in a list")
    schedule: tuple[Schedule, ...] = setting((), "numbers of the recipe that move with the step, in a list")
    controller: tuple[Controller, ...] = setting((), "numbers of the recipe that follow a metric, in a list")
    entropy: float = setting(0.0, "weight of the entropy bonus; 0 is off")
    policy_weight: float = setting(1.0, "weight of the policy gradient beside the other terms (CHORD: 1 - mu)", min=0)
    band: BandSettings = field(default_factory=BandSettings)
    teaching: TeachingSettings = field(default_factory=TeachingSettings)
    reuse: ReuseSettings = field(default_factory=ReuseSettings)
    positive_nll: float = setting(
        0.0, "weight of the mean of -log pi over the tokens of trajectories with positive reward (VAPO); 0 is off"
    )
    turn_order: Literal["together", "last_first", "first_first"] = setting(
        "together",
        "the turns of a trajectory are updated together, or one after another, each in a pass over the minibatch of "
        "its own: from the last to the first (SeeUPO) or from the first; the advantage is then times the ratios of "
        "the turns updated before, and denominators are still those of all turns",
    )
    token_order: Literal["together", "improbable_first", "probable_first"] = setting(
        "together",
        "all tokens are updated together, or those whose probability under mu is below `token_order_at` first and the "
        "others in a second pass over the batch (AR-Lopti), or these first; denominators are still those of all tokens",
    )
    token_order_at: float = setting(0.5, "probability that parts the two passes of token_order", above=0, below=1)
    aggregate: AggregateSettings = field(default_factory=AggregateSettings)
    ess: EssSettings = field(default_factory=EssSettings)
    bias: BiasSettings = field(default_factory=BiasSettings)


WITH_CRITIC = ("token_gae", "turn_gae", "turn_q", "bilevel_gae")
"""credits that a critic gives"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """Columns and passes that a recipe needs; the trainer computes no others."""

    proximal: bool
    """`log_proximal`: log-probs under the weights at the start of the step"""
    reference: bool
    value: bool
    """a critic"""
    median: bool
    """the median of the return, a second head of the critic"""
    turn_q: bool
    """one with Q heads"""
    entropy: bool
    """the entropy's gradient, not only its value"""
    entropy_value: bool
    """its value"""
    prob_square_sum: bool
    teacher: bool
    """the teachers' log-probs"""
    proxy_share: float
    """of the proxy distribution whose log-probs are needed (`KlSettings.proxy_share`); 0: of none"""
    per_trajectory_norms: bool
    """squared gradient norms of the `baseline` column per trajectory (OPOB, exact)"""
    clipping_bias_norm: bool
    """gradient norms of the `clipped` and the `policy` column (kappa, exact)"""
    noted: frozenset[str]
    """names of the task's notes"""
    parts: bool
    """the named parts of the reward"""
    before_forward: bool
    """trajectories are left out before the forward pass"""
    earlier: bool
    """the critic's rows of earlier pieces of the episodes that end"""


@lru_cache(maxsize=256)  # asked for several times a step
def requirements(recipe: Recipe) -> Requirements:
    """What the trainer has to compute for `recipe`: what its axes need, and the columns that a function of the user's
    own asks for. Raises UserError when that function cannot be imported."""
    own = load_own_function(recipe.name) if is_own_function(recipe.name) else None
    asked = own.needs if own is not None else frozenset()
    noted = own.noted if own is not None else frozenset()
    opob = recipe.advantage.baseline == "opob"
    kls = kl_terms(recipe)
    kappa = recipe.bias.kappa != "none"
    moving = moving_numbers(recipe)
    trust, mask, shape = recipe.trust, recipe.mask, recipe.shape
    reward = recipe.reward
    read = (recipe.select.drop_flag, recipe.advantage.note, reward.bonus_note, reward.answer_note,
            reward.length_target_note)  # fmt: skip
    return Requirements(
        proximal=recipe.ratio.denominator == "proximal"
        or trust.rule == "mix_ppo"
        or "kl.recent" in moving
        or any(kl.target == "proximal" for kl in kls),
        reference=recipe.ratio.denominator == "reference"
        or any(kl.target == "reference" for kl in kls)
        or "log_reference" in asked,
        value=recipe.advantage.credit in WITH_CRITIC or "value" in asked,
        median=trust.rule == "bpo",
        turn_q=recipe.advantage.credit == "turn_q",
        entropy=recipe.entropy != 0.0 or recipe.band.weight > 0 or not moving.isdisjoint({"entropy", "band.weight"}),
        entropy_value=min(mask.entropy_share, mask.turn_entropy_share, *(kl.certain_share for kl in kls), 1.0) < 1
        or shape.turn_entropy > 0
        or shape.clarity != 0
        or shape.entropy_bonus > 0
        or shape.positive_entropy
        or recipe.reward.outcome == "certainty"
        or recipe.advantage.equal == "entropy"
        or recipe.reuse.nll_weight == "certainty"
        or recipe.band.weight > 0
        or "band.weight" in moving
        or (trust.rule in ("ppo", "aspo") and trust.uncertain_share > 0),
        prob_square_sum=(opob and recipe.opob.norm == "logit") or (kappa and recipe.bias.estimator == "logit"),
        teacher=recipe.teaching.coefficient > 0 or "teaching.coefficient" in moving or "log_teacher" in asked,
        proxy_share=next((kl.proxy_share for kl in kls if kl.target == "proxy"), 0.0),
        per_trajectory_norms=opob and recipe.opob.norm == "exact",
        clipping_bias_norm=kappa and recipe.bias.estimator == "exact",
        noted=frozenset(noted).union(filter(None, read)),
        parts=recipe.advantage.parts == "each",
        before_forward=recipe.select.before_forward,
        earlier=recipe.gae.value_earlier,
    )


def kl_terms(recipe: Recipe) -> tuple[KlSettings, ...]:
    """The KL terms that are, or may become in the course of the run, other than 0."""
    moving = "kl.coefficient" in moving_numbers(recipe)
    return tuple(
        kl for number, kl in enumerate((recipe.kl, *recipe.more_kl)) if kl.coefficient != 0 or (number == 0 and moving)
    )


def passes(recipe: Recipe) -> int | None:
    """In how many passes over a batch its tokens are updated one after another; None: as many as a trajectory of the
    minibatch has turns."""
    if recipe.turn_order != "together":
        return None
    return 1 if recipe.token_order == "together" else 2


@lru_cache(maxsize=256)
def has_kl(recipe: Recipe) -> bool:
    """Whether it has a KL term, or may get one in the course of the run."""
    return bool(kl_terms(recipe))


def moving_numbers(recipe: Recipe) -> frozenset[str]:
    """Names of the numbers that follow a schedule or a controller."""
    followed = [schedule.number for schedule in recipe.schedule]
    return frozenset([*followed, *(controller.number for controller in recipe.controller)])
