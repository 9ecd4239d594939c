"""The watch for what engine and trainer disagree about at equal weights: metric rows in, one piece of advice out.

It is no alarm: nothing has collapsed and going back would not help. What it says is in objective/mismatch.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isnan
from statistics import median

from async_rl.config import Settings
from async_rl.events import MismatchFound
from async_rl.objective.library import load_recipe
from async_rl.objective.mismatch import Bounds, EngineArithmetic, bounds_of, remedy_of
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import Recipe


@dataclass(slots=True, kw_only=True)
class MismatchWatch:
    """`kl/mismatch` of the last steps that had tokens of the newest weights. Pure; a resumed run rebuilds it."""

    recipe: Recipe
    engine: EngineArithmetic
    share: float
    """of the recipe's bounds that ratios of equal weights may spread by; 0: never a word"""
    window: int
    """steps"""
    updates: int
    """optimizer steps that a batch is used for"""
    recent: deque[tuple[float, float]] = field(init=False)
    """(kl/mismatch, policy tokens of a trajectory) of the last window"""
    said: bool = False

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.window)

    @property
    def bounds(self) -> Bounds:
        return bounds_of(self.recipe)

    def rebuild(self, rows: Iterable[Mapping[str, float]]) -> None:
        for row in rows:
            self.check(row)

    def check(self, row: Mapping[str, float]) -> MismatchFound | None:
        """Add the next metric row; returns what there is to say, once in a run."""
        mismatch = row.get("kl/mismatch")
        if not self.share or self.said or mismatch is None or isnan(mismatch):
            return None
        self.recent.append((mismatch, max(1.0, row.get("len/mean", 1.0))))
        if len(self.recent) < self.window:
            return None
        usual, length = median(m for m, _ in self.recent), median(n for _, n in self.recent)
        bounds = self.bounds
        level = bounds.level(self.share, length)
        if usual <= level:
            return None
        self.said = True
        return MismatchFound(
            step=int(row["step"]), mismatch=usual, level=level,
            reason=explain(usual, level, bounds, length),
            remedy=remedy_of(self.recipe, self.engine, usual, updates=self.updates),
        )  # fmt: skip


def explain(mismatch: float, level: float, bounds: Bounds, length: float) -> str:
    """In words and numbers."""
    of = {"token": "of tokens", "mean": "of trajectories (means)", "sum": "of trajectories (sums)"}[bounds.over]
    return (
        f"engine and trainer disagree at equal weights: kl/mismatch {mismatch:.2g} nats, above {level:.2g}; ratios "
        f"{of} spread by {bounds.spread(mismatch, length):.2g} nats where all should be 1, and the recipe's bound "
        f"({bounds.name}) is {bounds.width:.2g}"
    )


def engine_arithmetic(settings: Settings) -> EngineArithmetic:
    """What the settings say of the engine's arithmetic."""
    half = settings.generator.dtype == "bfloat16"
    vllm = settings.generator.engine == "vllm"
    return EngineArithmetic(
        half=half,
        rounds_logits=half and vllm and settings.vllm.head_dtype == "model",
        quantization=settings.generator.quantization if settings.generator.quantization != "none" else "",
    )


def make_mismatch_watch(settings: Settings) -> MismatchWatch:
    """Of a run. A recipe of one's own is nothing that could be judged."""
    recipe, updates = load_recipe(settings.recipe), settings.updates
    return MismatchWatch(
        recipe=recipe,
        engine=engine_arithmetic(settings),
        share=0.0 if is_own_function(recipe.name) or not settings.guard.alarms else settings.guard.mismatch,
        window=settings.guard.window,
        updates=updates.epochs * updates.minibatches,
    )
