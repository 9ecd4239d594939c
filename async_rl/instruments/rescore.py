"""Scores other recipes on the stored batches of a run: nothing is generated, and nothing of the run is changed.

The run's own learner is trained again over the stored batches, as `replay` does, from the nearest whole checkpoint at
or before the first step that is asked for (or from the initial model). So every step is judged under exactly the
weights that the run had before it. At each step every recipe forms its coefficients and its gradient for the step's
first update; then the run's own recipe takes the step. Other recipes begin with a fresh running state (ESS reference,
kappa) at the first step asked for and keep their own from there on.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from async_rl.buffer.store import StoreReader
from async_rl.config import Settings
from async_rl.config.schema import with_overrides
from async_rl.errors import UserError
from async_rl.instruments.retraining import Retraining
from async_rl.model.folder import load_model
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.own import check_recorded
from async_rl.objective.recipe import Recipe, requirements
from async_rl.objective.trust import bucket_names, length_bucket
from async_rl.run.placement import threads_here
from async_rl.run_folder import RunFolder, read_rows, replace_text
from async_rl.task import task_class
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import load_checkpoint
from async_rl.trainer.learner import Learner, Preview
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of
from async_rl.trainer.packing import PackedBatch, pack_step
from async_rl.trajectory.codec import unpack

OWN = "the run's own"

NUMBERS = {
    "ess": "ess/ratio",
    "ess_reference": "ess/reference",
    "clip_frac": "clip/frac",
    "clip_bias": "clip/bias",
    "rejected_tokens": "reject/tokens",
    "grad_norm": "grad/norm",
}
"""numbers of a step that are metrics of the objective"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScore:
    """One recipe on the batch of one step. None where a number is not defined (a gradient of 0)."""

    step: int
    ess: float | None
    ess_reference: float | None
    learning_rate_factor: float
    clip_frac: float | None
    clip_bias: float | None
    rejected_tokens: float | None
    """share of the batch's policy tokens"""
    coefficient_norm: float
    """L2 over policy tokens"""
    coefficient_max: float
    grad_norm: float | None
    cosine: float | None
    """of its gradient with that of the run's own recipe"""
    cosine_update: float | None
    """of its descent direction with the change of weights that the run made"""
    skipped: str


@dataclass(slots=True, kw_only=True)
class Score:
    """One recipe over all steps."""

    recipe: str
    """as it was asked for"""
    steps: list[StepScore] = field(default_factory=list)
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """reason -> bucket of length -> trajectories"""
    trajectories: Counter[str] = field(default_factory=Counter)
    """by bucket of length, of the batches"""

    def mean(self, name: str) -> float | None:
        values = [getattr(step, name) for step in self.steps]
        found = [value for value in values if value is not None]
        return fmean(found) if found else None

    def rejected_share(self) -> dict[str, dict[str, float]]:
        """reason -> bucket of length -> share of the trajectories of that length."""
        return {
            reason: {bucket: counts[bucket] / n for bucket, n in self.trajectories.items() if n}
            for reason, counts in self.rejected.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    first: int
    last: int
    """steps first <= step < last"""
    begun: str
    """where the weights come from, for the terminal"""
    scores: list[Score]
    """the run's own recipe first"""


def rescore(
    folder: RunFolder,
    recipes: Sequence[str],
    *,
    steps: str = ":",
    each_step: Callable[[int], None] = lambda _: None,
) -> Rescored:
    """Score `recipes` (a name, and `axis=value` words behind it) on the stored batches. Raises UserError."""
    settings = folder.settings()
    check_recorded(folder.path, str(settings.recipe["name"]))
    trained = max((int(row["step"]) + 1 for row in read_rows(folder.metrics)), default=0)
    first, last = parse_steps(steps, trained)
    chosen = {text: _recipe(text, settings) for text in recipes}
    torch.set_num_threads(threads_here(settings).trainer.threads)
    learner = make_learner(settings)
    others = {text: _learner(text, recipe, learner, settings) for text, recipe in chosen.items()}
    scores = {text: Score(recipe=text) for text in (OWN, *others)}
    with StoreReader(folder.store) as store:
        begun = _begin(folder, store.first_step(), first, learner)
        with Retraining.of(folder, learner) as retraining:
            for step in range(learner.version, last):
                packed = _batch(store, settings, step)
                if step < first:
                    retraining.step(packed)
                    continue
                looks = {OWN: learner.preview(packed)}
                for text, other in others.items():
                    other.version = learner.version
                    looks[text] = other.preview(packed)
                    other.state = looks[text].state
                before = _flat(learner)
                retraining.step(packed)
                update = _flat(learner) - before
                for text, look in looks.items():
                    _add(scores[text], step, look, looks[OWN], update, packed)
                each_step(step)
    return Rescored(first=first, last=last, begun=begun, scores=list(scores.values()))


def parse_steps(text: str, trained: int) -> tuple[int, int]:
    """`a:b`, either end may be left out. Raises UserError."""
    begin, colon, end = text.partition(":")
    try:
        first, last = int(begin or 0), int(end or trained)
    except ValueError:
        colon = ""
        first = last = 0
    if not colon:
        raise UserError(f"--steps is {text!r}; write a:b for the steps a <= step < b")
    if trained == 0:
        raise UserError("the run has trained no step yet")
    if not 0 <= first < last <= trained:
        raise UserError(f"--steps is {text!r}; the run has trained steps 0 to {trained - 1}: write 0:{trained} or less")
    return first, last


def _recipe(text: str, settings: Settings) -> Recipe:
    words = shlex.split(text)
    if not words or any("=" not in word for word in words[1:]) or "=" in words[0]:
        raise UserError(f"--recipe is {text!r}; write a recipe's name, and axis=value words behind it in quotes")
    recipe = load_recipe(with_overrides({"name": words[0]}, words[1:]))
    own = requirements(load_recipe(settings.recipe))
    if requirements(recipe).value and not own.value:
        raise UserError(f"--recipe {words[0]} needs a critic, and the run trained none (its recipe had no use for one)")
    check_effect(
        recipe,
        group_size=settings.batch.group_size,
        updates_per_batch=1,  # the first update of each batch is what is looked at
        max_staleness=settings.staleness.max_staleness,
        has_critic=own.value,
        single_turn=task_class(settings.task.name).single_turn,
    )
    return recipe


def _learner(text: str, recipe: Recipe, own: Learner, settings: Settings) -> Learner:
    """Another recipe on the model (and critic) of the run's own learner. It measures and takes no step."""
    reference = own.reference
    if requirements(recipe).reference and reference is None:
        reference = load_model(Path(settings.model.path), device=settings.trainer.device).requires_grad_(False)
    critic = own.critic if requirements(recipe).value else None
    return Learner(own.model, recipe, own.options, reference=reference, critic=critic)


def _begin(folder: RunFolder, first_stored: int, first: int, learner: Learner) -> str:
    """Bring the learner to a version at or before `first`; returns where its weights come from. Raises UserError."""
    whole = [path for path in list_checkpoints(folder.checkpoints) if damage_of(path) is None]
    able = [path for path in whole if first_stored <= version_of(path) <= first]
    if able:
        nearest = max(able, key=version_of)
        load_checkpoint(nearest, learner)
        version = version_of(nearest)
    elif first_stored == 0:
        version = 0
    else:
        raise UserError(
            f"{folder.path}: the batches before step {first_stored} are deleted and no whole checkpoint lies between "
            f"them and step {first}; give --steps from a later step on"
        )
    start = f"the checkpoint of version {version}" if able else "the initial model"
    again = f", trained again up to version {first}" if version < first else ""
    return f"weights: {start}{again}, then step by step as the run trained"


def _batch(store: StoreReader, settings: Settings, step: int) -> PackedBatch:
    blobs = store.load_batch(step)
    if blobs is None:
        raise UserError(f"{store.path}: the batch of step {step} is not in it")
    return pack_step(settings, [unpack(blob) for blob in blobs], whole=True)  # some recipes need it


def _flat(learner: Learner) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in learner.trained().values()])


def _add(score: Score, step: int, look: Preview, own: Preview, update: Tensor, batch: PackedBatch) -> None:
    metrics = look.metrics
    score.steps.append(
        StepScore(
            step=step,
            **{name: metrics.get(key) for name, key in NUMBERS.items()},
            learning_rate_factor=look.learning_rate_factor,
            coefficient_norm=float(torch.linalg.vector_norm(look.coefficients.double())),
            coefficient_max=float(look.coefficients.abs().max()) if len(look.coefficients) else 0.0,
            cosine=cosine(look.gradient, own.gradient),
            cosine_update=cosine(-look.gradient, update),
            skipped=look.skipped,
        )
    )
    lengths = torch.zeros(batch.num_trajectories, dtype=torch.float64)
    trajectory = batch.trajectory_of_turn[batch.turn_of_token].cpu()
    lengths.index_add_(0, trajectory, torch.ones(len(trajectory), dtype=torch.float64))
    names = bucket_names()
    score.trajectories.update(names[i] for i in length_bucket(lengths).tolist())
    for key, value in metrics.items():
        reason, _, bucket = key.removeprefix("reject/").partition("/")
        if key.startswith("reject/") and bucket in names:
            score.rejected[reason][bucket] += round(value)


def cosine(a: Tensor, b: Tensor) -> float | None:
    """In float64; None when either is 0 or not finite."""
    a, b = a.double(), b.double()
    size = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / size if size > 0 and math.isfinite(size) else None


COLUMNS: tuple[tuple[str, str], ...] = (
    ("ess", "ESS"),
    ("learning_rate_factor", "rate x"),
    ("clip_frac", "clipped"),
    ("rejected_tokens", "rejected"),
    ("coefficient_norm", "|coef|"),
    ("grad_norm", "|grad|"),
    ("cosine", "cos grad"),
    ("cosine_update", "cos update"),
)


def describe_scores(result: Rescored, folder: RunFolder) -> list[str]:
    """Means over the steps as a table, and what was rejected by length."""
    rows = [("recipe", *(title for _, title in COLUMNS))]
    for score in result.scores:
        rows.append((score.recipe, *(_shown(score.mean(name)) for name, _ in COLUMNS)))
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{folder.path}: steps {result.first} to {result.last - 1}, means", result.begun, ""]
    lines += ["  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows]
    for score in result.scores:
        for reason, shares in score.rejected_share().items():
            if any(shares.values()):
                told = ", ".join(f"{bucket} tokens {share:.0%}" for bucket, share in shares.items())
                lines.append(f"{score.recipe} rejected ({reason}), share of the trajectories: {told}")
        skipped = [step for step in score.steps if step.skipped]
        if skipped:
            lines.append(f"{score.recipe} would have skipped {len(skipped)} steps, first: {skipped[0].skipped}")
    return lines


def write_json(path: Path, result: Rescored, folder: RunFolder) -> None:
    """Everything, step by step."""
    plain: Mapping[str, Any] = {
        "run": str(folder.path),
        "steps": [result.first, result.last],
        "weights": result.begun,
        "recipes": {
            score.recipe: {
                "means": {name: score.mean(name) for name, _ in COLUMNS},
                "rejected_share_by_length": score.rejected_share(),
                "trajectories_by_length": dict(score.trajectories),
                "steps": [asdict(step) for step in score.steps],
            }
            for score in result.scores
        },
    }
    try:
        replace_text(path, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 0.01 and value else f"{value:.3f}"
