"""Demonstrations of `pool.file` as trajectories: read, and tokenized as the generators tokenize prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from async_rl.buffer.demonstrations import Shown
from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer, problem_tokens, prompt_tokens
from async_rl.task.data_files import read_bytes
from async_rl.task.protocol import Problem, Task
from async_rl.task.rows import BadRow, Lines, Rows, json_rows
from async_rl.trajectory import Trajectory, Turn, VersionSpan

FIELDS = ("prompt", "answer", "messages", "problem", "reward", "end")
MOST_MATCHED = 20_000
"""training problems whose prompts are compared with those of rows that name no problem"""


def read_rows_of(path: str) -> Rows:
    """Rows of a .json or .jsonl file. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"pool.file is {path}; there is no such file")
    content = read_bytes(file)
    return json_rows(file.name, content) if file.suffix == ".json" else Lines(file.name, content)


def read_demonstrations_of(path: str, task: Task, tokenizer: Tokenizer, context: int) -> list[Shown]:
    """The demonstrations in `path`. context: tokens that a model takes, 0: not known. Raises UserError that names the
    row."""
    rows = read_rows_of(path)
    problems = task.problems("train")
    by_prompt: dict[tuple[int, ...], int] | None = None
    shown: list[Shown] = []
    for place in range(len(rows)):
        where = f"{path}, {rows.where(place)}"
        try:
            row = rows.values(place)
        except BadRow as error:
            raise UserError(f"{where}: {error}") from None
        try:
            number, trajectory = _demonstration(row, problems, tokenizer)
        except (ValueError, UserError) as error:
            raise UserError(f"{where}: {error}") from None
        if context and trajectory.longest_context > context:
            raise UserError(f"{where}: {trajectory.longest_context} tokens, and the context holds {context}")
        if number < 0 and len(problems) <= MOST_MATCHED:
            if by_prompt is None:
                by_prompt = {tuple(problem_tokens(p, tokenizer)): i for i, p in enumerate(problems)}
            number = by_prompt.get(tuple(trajectory.tokens[: trajectory.turns[0].start].tolist()), -1)
        shown.append((number, trajectory))
    if not shown:
        raise UserError(f"pool.file is {path}; it holds no row")
    return shown


def check_matched(shown: Sequence[Shown], *, by_problem: bool, path: str) -> list[str]:
    """A note on what the demonstrations answer. by_problem: they come back for groups of their problem only. Raises
    UserError where none could ever come back."""
    matched = sum(number >= 0 for number, _ in shown)
    if by_problem and not matched:
        raise UserError(
            f"pool.file: no row of {path} has the prompt of a training problem; give rows a `problem`, the number of "
            "the one that they answer, or set pool.place=extra"
        )
    what = f", {matched} of them to training problems" if by_problem else ""
    return [f"the pool holds {len(shown)} demonstrations{what}"]


def _demonstration(row: Mapping[str, Any], problems: Sequence[Problem], tokenizer: Tokenizer) -> tuple[int, Trajectory]:
    unknown = sorted(set(row) - set(FIELDS))
    number = row.get("problem", -1)
    if not isinstance(number, int) or isinstance(number, bool) or not -1 <= number < len(problems):
        raise UserError(f"`problem` is {number!r}; it is the number of a training problem, 0 to {len(problems) - 1}")
    reward = row.get("reward", 1.0)
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise UserError(f"`reward` is {reward!r}; it is a number")
    if "messages" in row:
        contexts = _of_messages(row["messages"], tokenizer)
    elif "answer" in row:
        contexts = _of_answer(row, number, problems, tokenizer)
    else:
        what = f" (it has {', '.join(unknown)})" if unknown else ""
        raise UserError(f"a row has `prompt` and `answer`, or `messages`{what}")
    return number, _trajectory(contexts, max(number, 0), float(reward))


Contexts = list[tuple[list[int], list[tuple[int, int]]]]
"""for each context: its tokens, and (start, length) of the answers in it"""


def _of_answer(row: Mapping[str, Any], number: int, problems: Sequence[Problem], tokenizer: Tokenizer) -> Contexts:
    """A prompt, or that of the problem, and an answer."""
    if "prompt" in row:
        prompt = prompt_tokens(row["prompt"], tokenizer)
    elif number >= 0:
        prompt = problem_tokens(problems[number], tokenizer)
    else:
        raise UserError("a row with `answer` has a `prompt` or the `problem` that it answers")
    if not isinstance(row["answer"], str) or not row["answer"]:
        raise UserError("`answer` is no text")
    answer = tokenizer.encode(row["answer"], behind=True)
    if row.get("end", True):
        answer = [*answer, tokenizer.eos_id]
    if not prompt:
        raise UserError("an empty prompt: nothing would predict the first token of the answer")
    return [([*prompt, *answer], [(len(prompt), len(answer))])]


def _of_messages(messages: Any, tokenizer: Tokenizer) -> Contexts:
    """Every message of the assistant is an answer; one that does not go on from what is there opens a context."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError("`messages` is a list of chat messages")
    contexts: Contexts = []
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if place == 0:
            raise UserError("`messages` begins with an answer; nothing would predict its first token")
        prompt = prompt_tokens(messages[:place], tokenizer)
        answer = _answer_in(messages[: place + 1], prompt, tokenizer)
        if contexts and prompt[: len(contexts[-1][0])] == contexts[-1][0]:
            contexts[-1] = ([*prompt, *answer], [*contexts[-1][1], (len(prompt), len(answer))])
        else:
            contexts.append(([*prompt, *answer], [(len(prompt), len(answer))]))
    if not contexts:
        raise UserError("`messages` holds no message of the assistant")
    return contexts


def _answer_in(messages: Sequence[Mapping[str, Any]], prompt: list[int], tokenizer: Tokenizer) -> list[int]:
    """Tokens of the last message behind `prompt`, up to the one that ends the turn: as the chat template writes them,
    else the text and the end of text."""
    if tokenizer.has_chat_template:
        whole = prompt_tokens(messages, tokenizer)
        behind = whole[len(prompt) :]
        end = next((i for i, token in enumerate(behind) if token in tokenizer.end_ids), None)
        if whole[: len(prompt)] == prompt and end is not None:
            return behind[: end + 1]
    text = messages[-1].get("content")
    if not isinstance(text, str) or not text:
        raise UserError("a message of the assistant has no text that could be trained")
    return [*tokenizer.encode(text, behind=True), tokenizer.eos_id]


def _trajectory(contexts: Contexts, problem: int, reward: float) -> Trajectory:
    """Log-probs are 0: its tokens stand over a denominator of 1."""
    tokens: list[int] = []
    turns: list[Turn] = []
    starts: list[int] = []
    for of_context, answers in contexts:
        starts.append(len(tokens))
        turns += [Turn(start=len(tokens) + start, length=length) for start, length in answers]
        tokens += of_context
    return Trajectory(
        group=0,
        sample=0,
        problem=problem,
        split="train",
        seed=0,
        tokens=np.array(tokens, np.int32),
        log_behaviour=np.zeros(len(tokens), np.float32),
        turns=tuple(turns),
        versions=(VersionSpan(version=0, start=turns[0].start, end=len(tokens)),),
        reward=reward,
        ended="finished",
        contexts=tuple(starts[1:]),
    )


def demonstrations_of(
    settings: Settings, task: Task, tokenizer: Tokenizer, context: int
) -> tuple[tuple[Shown, ...], list[str]]:
    """Those of a new run, and notes for the user; none where there is no `pool.file`. Raises UserError."""
    pool = settings.pool
    if not pool.file:
        return (), []
    shown = read_demonstrations_of(pool.file, task, tokenizer, context)
    return tuple(shown), check_matched(shown, by_problem=pool.place != "extra", path=pool.file)
