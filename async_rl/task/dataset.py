"""The user's own prompts and answers, from files: one turn, judged by a named reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from async_rl.errors import UserError
from async_rl.task.dataset_settings import DatasetSettings
from async_rl.task.generated import require_range
from async_rl.task.layout import Layout
from async_rl.task.presets import with_preset
from async_rl.task.problem_fields import value_of
from async_rl.task.protocol import FitPrompts, Measure, Problem, Reward, Sample, Session, Task
from async_rl.task.reward import NAMES, VerdictTimeout, check_rows, make_rewards, sample_of
from async_rl.task.splitting import Overlong, find_overlong, read_splits
from async_rl.task.table import Problems
from async_rl.trajectory import Ended, Split

__all__ = ["Dataset", "DatasetSettings"]

TIMED_OUT = "reward_timeout"
"""note of an episode whose verdict came too late"""


class Dataset(Task):
    """One turn: the prompt, the completion, the named reward of it against the row's answer.

    `problem.data` holds `answer` (text; a list of texts, of which any counts; for a reward of one's own also an object
    as the row has it), `row` (the other fields) and `where` (file and line). Raises UserError for a file, row or field
    that is wrong. There are no demonstrations: an answer alone does not say how it is found.
    """

    name = "dataset"
    single_turn = True
    Settings = DatasetSettings

    def __init__(self, settings: DatasetSettings) -> None:
        _check(settings)
        self.settings: DatasetSettings = settings
        self.reward, self.group_reward = make_rewards(settings.reward, settings.group_reward, settings.answer_field)
        splits = read_splits(settings, Layout(settings))
        self.notes = splits.notes
        self._digest = splits.digest
        self.tables = splits.tables
        """the rows of its files"""
        overlong = Overlong.read(settings.overlong_rows)
        self._train, self._eval = overlong.left_of(splits.train, "train"), overlong.left_of(splits.eval, "eval")
        check_rows((self.reward, self.group_reward), (self._train, self._eval))

    @classmethod
    def complete(cls, args: Mapping[str, Any]) -> Mapping[str, Any]:
        return with_preset(args)

    def digest(self) -> str:
        """Of the rows: that of the files' bytes, in order, those of the held-out rows among them."""
        return self._digest

    def fit(self, measure: Measure, context: int, *, answer: int | None = None) -> FitPrompts | None:
        """See `Task.fit`. Raises UserError for prompts that are refused (`overlong`)."""
        answer = self.settings.max_tokens if answer is None else answer
        if answer >= context:
            raise UserError(
                f"task.args.max_tokens is {answer}, which leaves no room for a prompt in a context of {context} "
                "tokens; lower it, or raise generator.max_context"
            )
        splits: dict[Split, Problems] = {"train": self._train, "eval": self._eval}
        found, notes = find_overlong(splits, measure, context - answer, self.settings)
        rows = found.write()
        return FitPrompts(args={"overlong_rows": rows}, notes=notes) if rows else None

    def problems(self, split: Split) -> Sequence[Problem]:
        """Empty only for the eval split, when `eval_share` is 0 and there is no `eval_path`."""
        return self._train if split == "train" else self._eval

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        self.note_values(problem, session)
        text = await session.generate(max_tokens=self.settings.max_tokens, stop=tuple(self.settings.stop))
        return await self.judge(text, problem, session)

    def note_values(self, problem: Problem, session: Session) -> None:
        """Note the numbers of the problem's row that recipes read (`note_fields`)."""
        for name in self.settings.note_fields:
            number = value_of(problem, name)
            if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                session.note(name, number)

    async def judge(
        self, text: str, problem: Problem, session: Session, *, transcript: str = "", ended: Ended | None = None
    ) -> Reward:
        """The reward of an episode that ends with the answer `text`. `transcript`: everything behind the prompt, where
        that is more than the turns; `ended`: where the session does not tell."""
        if not session.stopped and ended is None:
            session.end_at_token_limit()
        ended = ended or ("finished" if session.stopped else "length")
        sample = sample_of(problem, session, text, transcript=transcript, ended=ended)
        try:
            return await self.reward.judge(self.with_calls(sample), session.note)
        except VerdictTimeout:
            # not a failure of the reward function: the answer could not be confirmed, so it earns nothing
            session.note(TIMED_OUT, 1.0)
            return 0.0

    async def unanswered(self, problem: Problem, session: Session, *, transcript: str) -> Reward:
        """The reward of an episode that ended without an answer: none, unless the reward looks at how it ended."""
        if not self.reward.function.sees_the_end or not session.said:
            return 0.0 if self.reward.name in NAMES else {}
        ended: Ended = "length" if session.truncated else "turn_limit"
        return await self.judge(session.said[-1].text, problem, session, transcript=transcript, ended=ended)

    def with_calls(self, sample: Sample) -> Sample:
        """`sample` with the calls of tools in its turns."""
        return sample

    @property
    def repeatable(self) -> bool:  # type: ignore[override]  # here it depends on the reward
        """A built-in reward is; one's own where it is a plain function: what asks somebody else is `async def`."""
        return self.reward.name in NAMES or not self.reward.function.waits

    @property
    def has_group_reward(self) -> bool:
        return self.group_reward is not None

    @property
    def reward_parts(self) -> Sequence[str] | None:
        if self.group_reward is not None or self.reward.name not in NAMES:
            return None
        return ()

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Sequence[Reward]:
        assert self.group_reward is not None
        return await self.group_reward.judge_group([self.with_calls(sample) for sample in samples])


def _check(settings: DatasetSettings) -> None:
    """Raises UserError for settings that contradict each other, before any file is read."""
    if not settings.path:
        raise UserError("task.args.path is not set; name a file with your rows, e.g. a .jsonl or .parquet file")
    if not 0 <= settings.eval_share < 1:
        raise UserError(f"task.args.eval_share is {settings.eval_share}; it must be at least 0 and below 1")
    if not settings.prompt_field:
        raise UserError("task.args.prompt_field is empty; name the field with the prompts")
    if settings.answer_in_prompt and settings.answer_field:
        raise UserError(
            f"task.args.answer_in_prompt takes the answer from the chat, and task.args.answer_field is "
            f"'{settings.answer_field}'; set one of the two: answer_field='' or answer_in_prompt=false"
        )
    if not settings.answer_field and not settings.answer_in_prompt and settings.reward in NAMES:
        raise UserError(
            f"task.args.answer_field is empty, but reward '{settings.reward}' needs an answer; name the field"
        )
    if settings.answer_after and not settings.answer_field and not settings.answer_in_prompt:
        raise UserError("task.args.answer_after has nothing to look in; name the answer_field, or leave it out")
    require_range("max_tokens", settings.max_tokens, 1, 10**7)
    if "" in settings.stop:
        raise UserError("task.args.stop holds an empty string, which would end every answer at once")
