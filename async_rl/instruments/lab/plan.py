"""What a lab is told, and the cells that follow from it. Reads no model and does not import torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from async_rl.config import Settings, check
from async_rl.config.imports import located
from async_rl.config.schema import load_yaml, setting, structured, with_overrides
from async_rl.errors import UserError, nearest
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.task import make_task, task_class

RUN_GROUPS = ("batch", "generator", "trainer", "updates", "reference", "optimizer", "critic")
"""groups of a run's settings that mean something to a cell"""
LABEL = re.compile(r"[A-Za-z0-9_.+]+")
"""labels are parts of file names"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabModel:
    """The initial models: size, and the supervised warm-up on a task's demonstrations."""

    hidden: int = setting(64, "width of the model")
    layers: int = setting(2, "layers")
    heads: int = setting(4, "attention heads")
    kv_heads: int = setting(2, "key and value heads")
    head_dim: int = setting(16, "width of a head")
    intermediate: int = setting(192, "width of the MLP")
    max_context: int = setting(128, "longest sequence", unit="tokens")
    warmup_steps: int = setting(2000, "supervised steps at most", unit="steps")
    warmup_batch: int = setting(64, "demonstrations in a supervised step", unit="demonstrations")
    warmup_learning_rate: float = setting(1e-3, "AdamW learning rate of the supervised steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabTask:
    """One task of the lab. Example: `sort: {args: {length: 6}, until: 0.3}`."""

    name: str = setting("", "the task; its label unless given")
    args: dict[str, Any] = setting({}, "settings of the task")
    until: float = setting(0.3, "success rate at which the warm-up of its initial models stops")
    run: dict[str, Any] = setting({}, "settings of a run that cells of this task have, laid over those of all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of these; what is left empty is taken from the lab's own lists."""

    tasks: list[Any] = setting([], "labels of tasks; empty: all")
    warm_ups: list[Any] = setting([], "initial models: a seed each, or the folder of a model")
    recipes: list[Any] = setting([], "labels of recipes; empty: all")
    lags: list[int] = setting([], "k: the batch of step s was sampled by version max(0, s - k)", unit="steps")
    learning_rates: list[float] = setting([], "of optimizer.learning_rate")
    seeds: list[int] = setting([], "seeds of sampling and of the order of problems")


@dataclass(frozen=True)
class LabSettings:
    """Everything a lab can be told."""

    name: str = setting("lab", "name of the lab, the title of its page")
    run: dict[str, Any] = setting({}, f"settings of a run that all cells share: {', '.join(RUN_GROUPS)}")
    model: LabModel = field(default_factory=LabModel)
    tasks: dict[str, Any] = setting({}, "label: task; `{}` takes the label for the task's name")
    recipes: dict[str, Any] = setting({}, "label: recipe; `{}` takes the label for the recipe's name")
    warm_ups: list[Any] = setting([0], "initial models: a seed each (made by the lab), or the folder of a model")
    lags: list[int] = setting([0], "k: the batch of step s was sampled by version max(0, s - k)", unit="steps")
    learning_rates: list[float] = setting([5e-4], "of optimizer.learning_rate")
    seeds: list[int] = setting([0], "seeds of sampling and of the order of problems")
    grids: list[Any] = setting([], "parts of the lab, each every combination of its own lists; empty: one of all")
    cell_timeout_s: float = setting(1800.0, "a cell that takes longer is given up, with this reason", unit="seconds")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One training of the lab."""

    warm_up: str
    """label of the initial model"""
    seed: int
    task: str
    """label"""
    lag: int
    recipe: str
    """label"""
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.warm_up}-{self.recipe}-k{self.lag}-lr{self.learning_rate:g}-s{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """A model that cells begin with."""

    task: str
    warm_up: str
    """label"""
    folder: Path | None
    """of a model that exists; None: the lab makes it"""
    seed: int
    """of the one it makes"""

    @property
    def name(self) -> str:
        return f"{self.task}-{self.warm_up}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabPlan:
    """A lab with everything resolved."""

    settings: LabSettings
    tasks: Mapping[str, LabTask]
    recipes: Mapping[str, Mapping[str, Any]]
    cells: tuple[Cell, ...]
    """every replicate's cells together, so that a lab cut short has compared everything on some seeds"""
    models: Mapping[str, InitialModel]
    """by name"""
    notes: tuple[str, ...]

    def model_of(self, cell: Cell) -> InitialModel:
        return self.models[f"{cell.task}-{cell.warm_up}"]

    def run_settings(self, cell: Cell, model: Path) -> Settings:
        """What the cell trains with; `staleness.max_staleness` is its exact lag."""
        return _run_settings(self.settings, self.tasks[cell.task], self.recipes[cell.recipe], cell, model)


def load_plan(path: Path, overrides: Sequence[str] = ()) -> LabPlan:
    """From a YAML file and `a.b=c` words, checked. Raises UserError."""
    values = with_overrides(load_yaml(path), overrides)
    for group in ("tasks", "recipes"):  # files of the user's own lie beside the lab's
        for entry in _mapping(group, values.get(group)).values():
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                entry["name"] = located(entry["name"], path.parent)
    return make_plan(structured(LabSettings, values, where=""))


def make_plan(settings: LabSettings) -> LabPlan:
    """Every cell of the lab, checked as far as that needs no model. Raises UserError."""
    if not settings.cell_timeout_s > 0:
        raise UserError(f"cell_timeout_s is {settings.cell_timeout_s}; it must be above 0")
    tasks = {_label("tasks", k): _task(str(k), v) for k, v in settings.tasks.items()}
    recipes = {_label("recipes", k): _recipe(str(k), v) for k, v in settings.recipes.items()}
    for kind, found in (("tasks", tasks), ("recipes", recipes)):
        if not found:
            raise UserError(f"{kind} is empty; name at least one, e.g. {kind}: {{{_EXAMPLE[kind]}: {{}}}}")
    cells: dict[str, Cell] = {}
    models: dict[str, InitialModel] = {}
    for number, values in enumerate(settings.grids or [{}]):
        for cell, model in _cells(settings, f"grids[{number}]", values, tasks, recipes):
            cells[cell.name] = cell
            known = models.setdefault(model.name, model)
            if known != model:
                raise UserError(f"warm_ups: {known.folder} and {model.folder} have one label, {model.warm_up}")
    plan = LabPlan(
        settings=settings,
        tasks=tasks,
        recipes=recipes,
        cells=tuple(sorted(cells.values())),
        models=models,
        notes=_notes(settings, tasks, recipes, cells.values()),
    )
    return plan


_EXAMPLE = {"tasks": "sort", "recipes": "vcpo"}


def _label(where: str, name: object) -> str:
    label = str(name)
    if not LABEL.fullmatch(label):
        raise UserError(f"{where}.{label}: a label names files; use letters, digits, '_', '.' and '+' only")
    return label


def _task(label: str, values: Any) -> LabTask:
    where = f"tasks.{label}"
    task = structured(LabTask, _mapping(where, values), where=where)
    _refuse_foreign(f"{where}.run", task.run)
    if not 0 < task.until <= 1:
        raise UserError(f"{where}.until is {task.until}; it is a success rate, above 0 and at most 1")
    name = task.name or label
    make_task(name, task.args)
    return LabTask(name=name, args=task.args, until=task.until, run=task.run)


def _recipe(label: str, values: Any) -> dict[str, Any]:
    recipe = {"name": label} | dict(_mapping(f"recipes.{label}", values))
    try:
        load_recipe(recipe)
    except UserError as error:
        raise UserError(f"recipes.{label}: {error}") from None
    return recipe


def _mapping(where: str, values: Any) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is a group of settings, not {values!r}; write {{}} for its defaults")
    return {str(k): v for k, v in values.items()}


def _refuse_foreign(where: str, run: Mapping[str, Any]) -> None:
    """Settings of a run that a cell decides itself, or that mean nothing where there is one process."""
    for name in run:
        if name not in RUN_GROUPS:
            raise UserError(
                f"{where}.{name}: a cell takes {', '.join(RUN_GROUPS)}; lag, recipe, task, seed and model come from "
                "the lab's own lists, and the rest belongs to processes that a cell does not have"
            )
    if "learning_rate" in _mapping(f"{where}.optimizer", run.get("optimizer")):
        raise UserError(f"{where}.optimizer.learning_rate would be ignored; set learning_rates")


def _cells(
    settings: LabSettings,
    where: str,
    values: Any,
    tasks: Mapping[str, LabTask],
    recipes: Mapping[str, Any],
) -> Iterator[tuple[Cell, InitialModel]]:
    grid = structured(Grid, _mapping(where, values), where=where)
    labels = (_known(f"{where}.tasks", grid.tasks, tasks), _known(f"{where}.recipes", grid.recipes, recipes))
    warm_ups = grid.warm_ups or settings.warm_ups
    lags, seeds = grid.lags or settings.lags, grid.seeds or settings.seeds
    rates = grid.learning_rates or settings.learning_rates
    for name, chosen in (("warm_ups", warm_ups), ("lags", lags), ("seeds", seeds), ("learning_rates", rates)):
        if not chosen:
            raise UserError(f"{name} is empty; name at least one")
    for name, numbers in (("lags", lags), ("seeds", seeds)):
        if min(numbers) < 0:
            raise UserError(f"{name}: {min(numbers)} is below 0")
    for rate in rates:
        if not 0 < rate < 1:
            raise UserError(f"learning_rates: {rate} does not lie between 0 and 1")
    for task, warm_up in product(labels[0], warm_ups):
        model = _model(task, tasks[task], warm_up)
        for seed, lag, recipe, rate in product(seeds, lags, labels[1], rates):
            cell = Cell(warm_up=model.warm_up, seed=seed, task=task, lag=lag, recipe=recipe, learning_rate=rate)
            yield cell, model


def _known(where: str, wanted: Sequence[Any], known: Mapping[str, Any]) -> list[str]:
    labels = [str(label) for label in wanted] or list(known)
    for label in labels:
        if label not in known:
            raise UserError(f"{where}: '{label}' is not among {where.rpartition('.')[2]}; {nearest(label, known)}")
    return labels


def _model(label: str, task: LabTask, warm_up: Any) -> InitialModel:
    if isinstance(warm_up, int) and not isinstance(warm_up, bool) and warm_up >= 0:
        if not make_task(task.name, task.args).has_demonstrations():
            raise UserError(
                f"tasks.{label}: task '{task.name}' has no demonstrations to warm a model up on; name the folder of "
                "a model in warm_ups"
            )
        return InitialModel(task=label, warm_up=f"w{warm_up}", folder=None, seed=warm_up)
    if isinstance(warm_up, str):
        folder = Path(warm_up)
        return InitialModel(task=label, warm_up=_label("warm_ups", folder.name), folder=folder, seed=0)
    raise UserError(f"warm_ups: {warm_up!r} is neither a seed (a whole number from 0) nor the folder of a model")


def _run_settings(lab: LabSettings, task: LabTask, recipe: Mapping[str, Any], cell: Cell, model: Path) -> Settings:
    values: dict[str, Any] = {}
    for given in (lab.run, task.run):
        for group, inner in given.items():
            values[group] = values.get(group, {}) | dict(_mapping(f"run.{group}", inner))
    values["optimizer"] = values.get("optimizer", {}) | {"learning_rate": cell.learning_rate}
    values |= {
        "name": "cell",
        "seed": cell.seed,
        "model": {"path": str(model)},
        "task": {"name": task.name, "args": task.args},
        "recipe": dict(recipe),
        "staleness": {"max_staleness": cell.lag},
    }
    settings = structured(Settings, values, where="run")
    check(settings)
    return settings


def _notes(
    settings: LabSettings, tasks: Mapping[str, LabTask], recipes: Mapping[str, Any], cells: Any
) -> tuple[str, ...]:
    """Checks the settings of every kind of cell; what is allowed but idle, once. Raises UserError."""
    _refuse_foreign("run", settings.run)
    notes: dict[str, None] = {}
    for label, name, lag in sorted({(c.task, c.recipe, c.lag) for c in cells}):
        cell = Cell(warm_up="", seed=0, task=label, lag=lag, recipe=name, learning_rate=1e-3)
        run = _run_settings(settings, tasks[label], recipes[name], cell, Path("model"))
        recipe = load_recipe(run.recipe)
        found = check_effect(
            recipe,
            group_size=run.batch.group_size,
            updates_per_batch=run.updates.epochs * run.updates.minibatches,
            max_staleness=lag,
            has_critic=requirements(recipe).value,
            single_turn=task_class(tasks[label].name).single_turn,
        )
        if lag > 0:  # at lag 0 corrections are idle by their nature, which is the comparison
            for note in found:
                notes[f"{name} on {label}: {note}"] = None
        if lag >= run.trainer.steps:
            raise UserError(
                f"lags: with a lag of {lag} and trainer.steps={run.trainer.steps} every batch comes from the initial "
                "model; raise trainer.steps above the largest lag"
            )
    return tuple(notes)


def digest_of(settings: Settings, more: str) -> str:
    """Names what a result depends on: nothing is done again while it is the same."""
    text = json.dumps([asdict(settings), more], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
