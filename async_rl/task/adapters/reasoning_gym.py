"""The task `reasoning_gym`: problems of any generator of the package reasoning-gym, scored as the package scores."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

from async_rl.config.schema import setting
from async_rl.errors import UserError, nearest
from async_rl.task.adapters.registry import require_package
from async_rl.task.adapters.worker import Worker, WorkerError, WorkerLate
from async_rl.task.generated import GeneratedTask
from async_rl.task.protocol import Problem, Reward, Session
from async_rl.task.reward import NUMBER

LIMIT_S = 20
"""longest processor time of one problem or one score; the slowest generators take 5 s for a problem"""
MOST_LATE = 10
"""problems one after the other that may be given up: a few generators never end for some of theirs"""
HELD_OUT_ONE_IN = 4
TAGGED = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)
INSTRUCTIONS = {
    "tags": "Think step by step, then give the answer alone between <answer> and </answer>.",
    "last_line": "Think step by step, then give the answer alone on the last line.",
    "number": "End with the answer as a number.",
    "whole": "",
}
OWN_INSTRUCTION = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGymSettings:
    """Example: `task: {name: reasoning_gym, args: {dataset: chain_sum, config: {max_terms: 2, max_digits: 2}}}`."""

    dataset: str = setting(
        "chain_sum", "a generator of reasoning-gym, or composite, which mixes those in config.datasets"
    )
    config: dict[str, Any] = setting({}, "settings of that generator, e.g. {min_terms: 2, max_terms: 2}")
    prompt: Literal["chat", "text"] = setting(
        "chat", "chat: a user message, for the model's chat template; text: as it stands, for a model that has none"
    )
    system: str = setting("", "system message put before the question; empty: none")
    instruction: str = setting(
        OWN_INSTRUCTION,
        "sentence put behind the question; auto: one that asks for the answer in the place that `answer` names; "
        "empty: none",
    )
    answer: Literal["tags", "last_line", "number", "whole"] = setting(
        "tags",
        "where the answer stands: between the last <answer> and </answer>, on the last line that is not empty, the "
        "last number of the completion, or all of it",
    )
    format_part: bool = setting(
        False,
        "a second part of the reward, `format`: 1 when an answer stands in its place and nothing follows it; the "
        "score is then the part `answer`",
    )
    max_tokens: int = setting(512, "longest completion", unit="tokens", min=1, max=1_000_000)
    num_train: int = setting(10_000, "training problems", unit="problems", min=1, max=10_000_000)
    num_eval: int = setting(256, "held-out problems", unit="problems", min=1, max=1_000_000)
    size: int = setting(
        20_000,
        "problems of the generator that both splits are drawn from (its own setting of that name)",
        unit="problems",
        min=2,
        max=100_000_000,
    )
    seed: int = setting(0, "decides the problems", min=0, max=2**32 - 1)


class ReasoningGym(GeneratedTask):
    """One turn: a question of the generator and the policy's answer, which earns what `score_answer` of the package
    gives it, 0 to 1. No answer in its place earns 0.

    Which split a problem belongs to is decided by a hash of its question, so no held-out question is trained on.
    `problem.data`: `index` in the generator, `answer` (None where many are right), `source` (the generator's name).
    Notes: `solved` (the score is 1), `score_timeout`, `score_error` (both earn 0).
    """

    name = "reasoning_gym"
    single_turn = True
    looked_at = 32
    Settings = ReasoningGymSettings

    def __init__(self, settings: ReasoningGymSettings) -> None:
        require_package(self.name)
        self.settings: ReasoningGymSettings = settings
        self._generator = {"generator": [settings.dataset, _checked(settings.config), settings.seed, settings.size]}
        self._scores = shared_worker("problems")
        try:
            super().__init__(
                self._draw,
                num_train=settings.num_train,
                num_eval=settings.num_eval,
                seed=settings.seed,
                held_out_one_in=HELD_OUT_ONE_IN,
            )
        except (WorkerError, WorkerLate) as error:
            raise UserError(_refusal(settings, str(error))) from None

    def _draw(self, random: Random) -> tuple[str, Any, Mapping[str, Any]]:
        for _ in range(MOST_LATE):
            index = random.randrange(self.settings.size)
            try:
                made = shared_worker("problems").ask({**self._generator, "index": index}, after=self._generator)
            except WorkerLate:
                continue
            break
        else:
            raise WorkerError(f"{MOST_LATE} problems each took more than {LIMIT_S} s of processor time")
        question = str(made["question"])
        asked = f"{question}\n\n{self.instruction}" if self.instruction else question
        data = {"index": index, "answer": made["answer"], "source": made["source"]}
        return question, self._prompt(asked), data

    def _prompt(self, asked: str) -> str | Sequence[Mapping[str, str]]:
        system = self.settings.system
        if self.settings.prompt == "text":
            return (f"{system}\n\n" if system else "") + asked
        user = {"role": "user", "content": asked}
        return [{"role": "system", "content": system}, user] if system else [user]

    @property
    def instruction(self) -> str:
        """The sentence behind the question."""
        chosen = self.settings.instruction
        return INSTRUCTIONS[self.settings.answer] if chosen == OWN_INSTRUCTION else chosen

    @property
    def reward_parts(self) -> Sequence[str]:
        return ("answer", "format") if self.settings.format_part else ()

    def right_answer(self, problem: Problem) -> str | None:
        answer = problem.data["answer"]
        return f"<answer>{answer}</answer>" if answer is not None and self.settings.answer == "tags" else answer

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        text = await session.generate(max_tokens=self.settings.max_tokens)
        if not session.stopped:
            session.end_at_token_limit()
        answer, formed = read_answer(text, self.settings.answer)
        score = 0.0 if answer is None else await self._score(problem, answer, session)
        session.note("solved", float(score == 1.0))
        return {"answer": score, "format": float(formed and session.stopped)} if self.settings.format_part else score

    async def _score(self, problem: Problem, answer: str, session: Session) -> float:
        asked = {**self._generator, "index": problem.data["index"], "answer": answer}
        try:
            # in a thread, because a score may take seconds and decoding must go on
            judged = await asyncio.to_thread(self._scores.ask, asked, after=self._generator)
        except WorkerLate:
            self._scores = shared_worker("scores")  # from now on no score holds up the making of problems
            session.note("score_timeout", 1.0)
            return 0.0
        except WorkerError:  # of code that reads what the policy wrote
            session.note("score_error", 1.0)
            return 0.0
        return float(judged["score"])


@cache
def shared_worker(purpose: str) -> Worker:
    """The child of this process for `purpose`; all tasks share it."""
    return Worker(Path(__file__).with_name("reasoning_gym_worker.py"), limit_s=LIMIT_S)


def read_answer(text: str, place: str) -> tuple[str | None, bool]:
    """(the answer in `text`, or None; whether it stands in its place with nothing behind it)."""
    if place == "whole":
        return text.strip(), bool(text.strip())
    if place == "last_line":
        lines = text.strip().splitlines()
        return (lines[-1].strip(), True) if lines else (None, False)
    if place == "number":
        numbers = list(NUMBER.finditer(text))
        if not numbers:
            return None, False
        behind = text[numbers[-1].end() :].strip(" .\n")
        return numbers[-1][0].replace(",", "").replace("\u2212", "-"), not behind
    found = list(TAGGED.finditer(text))
    if not found:
        return None, False
    return found[-1][1].strip(), len(found) == 1 and not text[found[-1].end() :].strip()


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for own in ("seed", "size"):
        if own in config:
            raise UserError(f"task.args.config.{own} is a setting of the task itself: write task.args.{own}")
    return config


def _refusal(settings: ReasoningGymSettings, reason: str) -> str:
    if "not registered" in reason:
        from reasoning_gym.factory import DATASETS

        return f"task.args.dataset '{settings.dataset}' is no generator of reasoning-gym; " + nearest(
            settings.dataset, DATASETS
        )
    return f"task.args.dataset '{settings.dataset}' with task.args.config {settings.config}: {reason}"
