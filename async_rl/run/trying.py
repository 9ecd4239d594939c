"""A few episodes of the present model, in this process and without training: what `async-rl try` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.model.folder import check_context, check_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.fitting import fit_prompts
from async_rl.run.preflight import check_device, check_fit, with_template_time
from async_rl.task import Task, make_task
from async_rl.task.order import PromptOrder
from async_rl.task.weigh import has_group_reward, weights_of
from async_rl.trajectory import Split, Trajectory
from async_rl.trajectory.types import group_seed
from async_rl.wire.messages import Permit


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is to be played. Made by `plan_trial`, which has checked it."""

    settings: Settings
    task: Task
    tokenizer: Tokenizer
    permits: tuple[Permit, ...]
    """one for each problem"""
    notes: tuple[str, ...]
    """remarks for the user"""

    @property
    def episodes(self) -> int:
        return sum(len(permit.samples) for permit in self.permits)


def plan_trial(settings: Settings, *, episodes: int, samples: int, split: Split) -> Trial:
    """Check model, task and their fit, and choose the problems: those a run would train on first, or the first held-out
    ones.

    Args:
        episodes: in all.
        samples: of each problem; 0: one, or a whole group where the task judges groups.

    Raises UserError.
    """
    config = check_folder(settings.model.path)
    check_device("generator.device", settings.generator.device)
    settings = with_template_time(settings)
    tokenizer = Tokenizer.of(settings.model)
    task = make_task(settings.task.name, settings.task.args)
    weights_of(task, settings.task.reward_weights)
    context = check_context(settings.model.path, config, settings.generator.max_context)
    settings, task, left_out = fit_prompts(settings, task, tokenizer, context)
    notes = left_out + check_fit(task, tokenizer, context)
    problems = task.problems(split)
    if not len(problems):
        raise UserError(f"task '{task.name}' has no problem in its {split} split; try the other one with --split")
    each = min(episodes, samples or (settings.batch.group_size if has_group_reward(task) else 1))
    order = PromptOrder(len(problems), settings.seed)
    count = min(-(-episodes // each), len(problems))
    temperature = settings.generator.temperature if split == "train" else settings.evaluation.temperature
    permits = tuple(
        Permit(
            group=number,
            problem=order(number) if split == "train" else number,
            split=split,
            samples=tuple(range(min(each, episodes - number * each))),
            seed=group_seed(settings.seed, number),
            temperature=temperature,
        )
        for number in range(count)
    )
    return Trial(settings=settings, task=task, tokenizer=tokenizer, permits=permits, notes=tuple(notes))


def play_trial(trial: Trial, on_judged: Callable[[Sequence[Trajectory]], None]) -> list[Trajectory]:
    """Play the episodes with the embedded engine. `on_judged`: called with those of a problem as soon as they have
    their rewards. Loads torch and the model."""
    from async_rl.generator.session import make_tickets
    from async_rl.model.decoder import DTYPES
    from async_rl.model.folder import load_model
    from async_rl.run.evaluate import limits_of, play

    settings, chosen = trial.settings, trial.settings.generator
    model = load_model(settings.model.path, dtype=DTYPES[chosen.dtype], device=chosen.device)
    return play(
        model,
        trial.task,
        trial.tokenizer,
        [ticket for permit in trial.permits for ticket in make_tickets(permit)],
        limits_of(settings),
        max_context=chosen.max_context or None,
        on_judged=on_judged,
    )
