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
    MaskSettings,
    OpobSettings,
    RatioSettings,
    RewardSettings,
    SelectSettings,
    ShapeSettings,
    TrustSettings,
)
from async_rl.objective.own import is_own_function, load_own_function


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A number of the recipe that moves with the step."""

    number: str = setting("", "which one, e.g. kl.coefficient")
    start: float = setting(0.0, "its value until step `since`")
    end: float = setting(0.0, "its value from step `until` on")
    since: int = setting(0, "step", unit="steps", min=0)
    until: int = setting(0, "step", unit="steps", min=0)
    course: Literal["linear", "cosine", "jump"] = setting("linear", "between the two; jump: `start` until `until`")


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
    entropy_value: bool
    """its value"""
    prob_square_sum: bool
    per_trajectory_norms: bool
    """squared gradient norms of the `baseline` column per trajectory (OPOB, exact)"""
    clipping_bias_norm: bool
    """gradient norms of the `clipped` and the `policy` column (kappa, exact)"""
    noted: frozenset[str]
    """names of the task's notes"""
    parts: bool
    """the named parts of the reward"""


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
    trust, mask, shape = recipe.trust, recipe.mask, recipe.shape
    return Requirements(
        proximal=recipe.ratio.denominator == "proximal" or any(kl.target == "proximal" for kl in kls),
        reference=recipe.ratio.denominator == "reference"
        or any(kl.target == "reference" for kl in kls)
        or "log_reference" in asked,
        value=recipe.advantage.credit in ("token_gae", "turn_gae") or "value" in asked,
        entropy=recipe.entropy != 0.0 or any(moves.number == "entropy" for moves in recipe.schedule),
        entropy_value=min(mask.entropy_share, mask.turn_entropy_share, *(kl.certain_share for kl in kls), 1.0) < 1
        or shape.turn_entropy > 0
        or shape.clarity != 0
        or (trust.rule == "aspo" and trust.uncertain_share > 0),
        prob_square_sum=(opob and recipe.opob.norm == "logit") or (kappa and recipe.bias.estimator == "logit"),
        per_trajectory_norms=opob and recipe.opob.norm == "exact",
        clipping_bias_norm=kappa and recipe.bias.estimator == "exact",
        noted=frozenset(noted).union(name for name in (recipe.select.drop_flag, recipe.advantage.note) if name),
        parts=recipe.advantage.parts == "each",
    )


def kl_terms(recipe: Recipe) -> tuple[KlSettings, ...]:
    """The KL terms that are, or become in the course of a schedule, other than 0."""
    moving = any(moves.number == "kl.coefficient" for moves in recipe.schedule)
    return tuple(
        kl for number, kl in enumerate((recipe.kl, *recipe.more_kl)) if kl.coefficient != 0 or (number == 0 and moving)
    )
