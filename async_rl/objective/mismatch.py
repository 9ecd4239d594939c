"""What the mismatch of engine and trainer does to a recipe, and which setting to change.

With equal weights an engine of another arithmetic (bfloat16, FP8, another kernel) gives a token a log-prob that differs
from the trainer's by some d. `kl/mismatch` is the mean of e^d - 1 - d over tokens that the newest weights sampled,
about the mean of d^2 / 2: ratios of equal weights, where all should be 1, spread by sqrt(2 x mismatch) nats a token.
Over a trajectory of L tokens a sum of log-ratios spreads by sqrt(L) times that, a mean by 1 / sqrt(L). What that does
depends on the width of the recipe's bounds on its ratios: where the spread is half of it, one honest token in twenty is
outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, log, log1p, sqrt
from typing import Literal

from async_rl.errors import UserError
from async_rl.objective.conflicts import check_recipe
from async_rl.objective.recipe import Recipe

CLIPS = ("ppo", "cispo", "clip_cov", "sat", "aspo", "cpgd", "gbpo", "bpo", "mix_ppo")
"""rules whose bounds are 1 - clip_low and 1 + clip_high"""
USUAL = log(1.2)
"""nats; width of PPO's usual clip, for recipes without a bound on the ratio to the behaviour policy"""
Change = Mapping[str, str | float]
"""setting of the recipe -> value"""
DECOUPLED: Change = {
    "ratio.denominator": "proximal", "correction.rule": "interval", "correction.low": 0.5, "correction.high": 5.0,
}  # fmt: skip
MASK: Change = {"trust.rule": "interval", "trust.low": 0.5, "trust.high": 5.0}
MEAN: Change = {"ratio.pool": "mean"}
TOKEN: Change = {"ratio.level": "token"}
WHY = (
    (DECOUPLED, "the trust rule then acts on what training moved, and the mismatch is a weight of its own"),
    (MASK, "what the two disagree about by more is left out, the rest keeps its weight"),
    (MEAN, "a mean of log-ratios does not spread with the length"),
    (TOKEN, "ratios of tokens do not spread with the length"),
)
"""in the order in which they are tried"""
USUAL_LENGTH = 500.0
"""policy tokens of a trajectory, where two bounds are compared"""
TOO_MUCH, TOO_MUCH_QUANTIZED = 0.05, 0.3
"""nats; beyond it arithmetic is an unlikely cause (computed: 0.04 for SmolLM2-135M in FP8)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The narrowest bound on a recipe's ratio to the behaviour policy."""

    name: str
    """settings, in words"""
    width: float
    """nats of the log-ratio, from 1 to the nearer end"""
    over: Literal["token", "mean", "sum"]
    """what the ratio is of: a token, or a trajectory's tokens by their mean or sum"""

    def spread(self, mismatch: float, length: float) -> float:
        """Of the log-ratios of equal weights, nats; length: policy tokens of a trajectory."""
        one = sqrt(2 * max(0.0, mismatch))
        return one * {"token": 1.0, "mean": 1 / sqrt(length), "sum": sqrt(length)}[self.over]

    def level(self, share: float, length: float) -> float:
        """The kl/mismatch whose spread is this share of the width, nats."""
        return (share * self.width / self.spread(0.5, length)) ** 2 / 2


def bounds_of(recipe: Recipe) -> Bounds:
    """The bounds that an engine's mismatch runs into first."""
    ratio, correction = recipe.ratio, recipe.correction
    found: list[Bounds] = []
    if correction.rule != "none":
        low = -log(correction.low) if correction.rule == "interval" and correction.low > 0 else inf
        width = min(low, log(correction.high) if correction.high > 1 else USUAL)
        over = _over(correction.level, correction.pool)
        found.append(Bounds(name="recipe.correction.low and high", width=width, over=over))
    elif ratio.level != "none" and ratio.denominator != "reference":
        name, width = _trust_width(recipe)
        found.append(Bounds(name=name, width=width, over=_over(ratio.level, ratio.pool)))
    select = recipe.select
    for kind, low, high in (
        ("mean", select.geometric_low, select.geometric_high),
        ("sum", select.sequence_low, select.sequence_high),
    ):
        width = min(-log(low) if 0 < low < 1 else inf, log(high) if high > 1 else inf)
        if width < inf:
            name = f"recipe.select.{'geometric' if kind == 'mean' else 'sequence'}_low and high"
            found.append(Bounds(name=name, width=width, over="mean" if kind == "mean" else "sum"))
    none = Bounds(name="no bound, taken as PPO's 0.2", width=USUAL, over="token")
    return min(found, key=lambda bounds: bounds.level(1.0, USUAL_LENGTH), default=none)


def _over(level: str, pool: str) -> Literal["token", "mean", "sum"]:
    return "token" if level in ("token", "none") else "mean" if pool == "mean" else "sum"


def _trust_width(recipe: Recipe) -> tuple[str, float]:
    """(settings in words, nats) of the trust rule."""
    trust = recipe.trust
    clip = "recipe.trust.clip_low and clip_high"
    match trust.rule:
        case "gmpo":
            return clip, max(1e-6, min(trust.clip_low, trust.clip_high))
        case rule if rule in CLIPS:
            low = -log1p(-trust.clip_low) if trust.clip_low < 1 else inf
            return clip, max(1e-6, min(low, log1p(trust.clip_high)))
        case "interval":
            return "recipe.trust.low and high", min(-log(trust.low) if trust.low > 0 else inf, log(trust.high))
        case "truncate" | "topr" if trust.cap > 1:
            return "recipe.trust.cap", log(trust.cap)
        case "m2po" | "m2po_all":
            return "recipe.trust.second_moment", sqrt(trust.second_moment)
        case _:
            return "no bound, taken as PPO's 0.2", USUAL


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArithmetic:
    """What the engine does otherwise than the trainer, as far as settings say it."""

    half: bool
    """it computes in bfloat16"""
    rounds_logits: bool
    """and rounds its logits to bfloat16, too"""
    quantization: str = ""
    """of its weights; empty: none"""


def remedy_of(recipe: Recipe, engine: EngineArithmetic, mismatch: float, *, updates: int) -> str:
    """Which setting to change, in words. updates: optimizer steps that a batch is used for."""
    if engine.rounds_logits:
        return "set vllm.head_dtype=float32: vLLM rounds its logits to bfloat16, the trainer does not"
    if mismatch > (TOO_MUCH_QUANTIZED if engine.quantization else TOO_MUCH):
        return (
            "so much is not arithmetic alone: does the engine sample with what the trainer scores (a chat template's "
            "special tokens, generator.temperature, weights of another model)? `async-rl doctor` compares the two"
        )
    words = [_change(recipe, updates)]
    if engine.quantization:
        words.append(f"generator.quantization=none, without the speed of {engine.quantization}")
    elif engine.half:
        words.append("generator.dtype=float32, at a price in speed")
    return "; or ".join(word for word in words if word) or "`async-rl doctor` compares the two"


def _change(recipe: Recipe, updates: int) -> str:
    """The first change of the recipe that it bears and that makes the spread a smaller share of its bounds; empty where
    it is masked or weighed already."""
    before = bounds_of(recipe)
    if before.level(1.0, USUAL_LENGTH) >= Bounds(name="", width=log(2), over="token").level(1.0, USUAL_LENGTH):
        return ""  # no bound of those below is wider
    for change, why in WHY:
        if change is DECOUPLED and (updates == 1 or recipe.trust.rule not in ("ppo", "none")):
            continue
        changed = with_change(recipe, change)
        try:
            check_recipe(changed)
        except UserError:
            continue
        after = bounds_of(changed)
        if after.level(1.0, USUAL_LENGTH) > before.level(1.0, USUAL_LENGTH):
            return f"set {' '.join(f'recipe.{name}={value}' for name, value in change.items())}: {why}"
    return "take recipe.name=icepop, which leaves out the tokens on which the two disagree by more than its bounds"


def with_change(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with other values of some settings, unchecked."""
    for name, value in change.items():
        group, last = name.split(".")
        recipe = replace(recipe, **{group: replace(getattr(recipe, group), **{last: value})})
    return recipe
