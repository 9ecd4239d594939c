"""How long a task's prompts are for the run's model, and what becomes of those that the context has no room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.model.folder import check_context, check_folder
from async_rl.model.tokenizer import Tokenizer, control_in, problem_text, problem_tokens
from async_rl.task import Problem, Task, make_task

BATCH = 1024
"""prompts that are tokenised together"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptMeasure:
    """The `Measure` that counts with the tokenizer of the run."""

    tokenizer: Tokenizer

    def text(self, problem: Problem) -> str:
        try:
            return problem_text(problem, self.tokenizer)
        except UserError as error:
            raise UserError(f"{problem.data.get('where', f'problem {problem.index}')}: {error}") from None

    def tokens(self, problems: Sequence[Problem]) -> list[int]:
        found: list[int] = []
        for start in range(0, len(problems), BATCH):
            found += self._tokens(problems[start : start + BATCH])
        return found

    def _tokens(self, problems: Sequence[Problem]) -> list[int]:
        """Prompts without control tokens are counted together, by threads of the tokenizers library; the others are
        tokenised one by one, as the run does."""
        lengths = [0] * len(problems)
        for first in (True, False):
            plain = [
                i for i, problem in enumerate(problems)
                if first == (isinstance(problem.prompt, str) or not self.tokenizer.has_chat_template)
                and not control_in(problem, self.tokenizer)
            ]  # fmt: skip
            texts = [self.text(problems[i]) for i in plain]
            for i, length in zip(plain, self.tokenizer.lengths(texts, first=first), strict=True):
                lengths[i] = length
        return [
            length or len(problem_tokens(problem, self.tokenizer))
            for length, problem in zip(lengths, problems, strict=True)
        ]


def fit_prompts(settings: Settings, task: Task, tokenizer: Tokenizer, context: int) -> tuple[Settings, Task, list[str]]:
    """(settings, task, notes for the user): the settings with the `task.args` that leave overlong prompts out, and the
    task made of them. Both are the given ones where every prompt fits.

    Args:
        context: tokens; 0: not known.

    Raises UserError for prompts that are refused.
    """
    if not context:
        return settings, task, []
    try:
        found = task.fit(PromptMeasure(tokenizer=tokenizer), context)
    except ValueError as error:
        raise UserError(f"task '{task.name}' does not fit the tokenizer: {error}") from None
    if found is None:
        return settings, task, []
    chosen = replace(settings.task, args={**settings.task.args, **found.args})
    return replace(settings, task=chosen), make_task(chosen.name, chosen.args), list(found.notes)


def fitted(settings: Settings) -> Settings:
    """The settings with the `task.args` that leave overlong prompts out, as a run's preflight makes them: for what
    plays a run's problems without being one. Raises UserError for prompts that are refused."""
    context = check_context(settings.model.path, check_folder(settings.model.path), settings.generator.max_context)
    task = make_task(settings.task.name, settings.task.args)
    made, _, _ = fit_prompts(settings, task, Tokenizer.of(settings.model), context)
    return made
