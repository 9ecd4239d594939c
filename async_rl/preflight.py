"""What can be found wrong before anything is started, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from async_rl.errors import UserError
from async_rl.model.folder import check_folder
from async_rl.model.tokenizer import Tokenizer, prompt_text
from async_rl.objective.effect import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.settings import Settings
from async_rl.task import Task, make_task

SINGLE_TURN = ("sort", "reverse", "arithmetic", "countdown", "dataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the checks found out."""

    notes: list[str]
    """worth saying, not wrong"""
    train_problems: int


def preflight(settings: Settings) -> Facts:
    """Check model, tokenizer, task, recipe and their fit. Raises UserError."""
    config = check_folder(settings.model.path)
    tokenizer = Tokenizer(Path(settings.model.path))
    task = make_task(settings.task.name, settings.task.args)
    context = settings.generator.max_context or (config.max_context if config is not None else 0)
    if config is not None and settings.generator.max_context > config.max_context:
        raise UserError(
            f"generator.max_context is {settings.generator.max_context}, but the model of {settings.model.path} "
            f"holds {config.max_context} tokens"
        )
    for split in ("train", "eval"):
        _check_prompt(task, tokenizer, split, context)
    recipe = load_recipe(settings.recipe)
    notes = check_effect(
        recipe,
        group_size=settings.batch.group_size,
        updates_per_batch=settings.trainer.updates_per_batch,
        max_staleness=settings.staleness.max_staleness,
        has_critic=requirements(recipe).value,
        single_turn=settings.task.name in SINGLE_TURN,
    )
    return Facts(notes=notes, train_problems=len(task.problems("train")))


def _check_prompt(task: Task, tokenizer: Tokenizer, split: str, context: int) -> None:
    """The first problem of the split can be put to this model."""
    problems = task.problems(split)  # type: ignore[arg-type]
    if not len(problems):
        where = "task.args.eval_path or eval_share" if split == "eval" else "task.args.path"
        raise UserError(f"task '{task.name}' has no problem in its {split} split; see {where}")
    prompt = problems[0].prompt
    try:
        tokens = tokenizer.encode(prompt_text(prompt, tokenizer))
    except ValueError as error:
        raise UserError(f"task '{task.name}' does not fit the tokenizer: {error}") from None
    if context and len(tokens) >= context:
        raise UserError(
            f"the first {split} prompt has {len(tokens)} tokens, the context holds {context}; "
            "raise generator.max_context or use a model with a longer one"
        )
