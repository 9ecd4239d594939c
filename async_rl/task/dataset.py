"""The user's own prompts and answers, from a JSONL or Parquet file: one turn, judged by a named reward."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from async_rl.config.schema import setting
from async_rl.errors import UserError, nearest
from async_rl.task.generated import Prompt, require_range, stable_hash
from async_rl.task.protocol import Problem, Session, Task
from async_rl.task.reward import VerdictTimeout, last_number, make_reward
from async_rl.trajectory import Split

log = logging.getLogger(__name__)

SPLIT_BUCKETS = 10_000
"""resolution of eval_share"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Example: `task: {name: dataset, args: {path: configs/data/word_problems.jsonl, reward: numeric}}`."""

    path: str = setting("", "JSONL or Parquet file; relative paths start at the working directory")
    eval_path: str = setting("", "file of the held-out problems; empty: eval_share of `path`")
    eval_share: float = setting(
        0.1, "share of `path` held out; the hash of a prompt decides, so more rows move none from split to split"
    )
    prompt_field: str = setting("prompt", "field with the prompt: text, or chat messages (role, content)")
    answer_field: str = setting("answer", "field with the answer; empty: the rows have none (reward of your own)")
    as_chat: bool = setting(True, "make a text prompt the user's message of a chat; no: give it as it is")
    system: str = setting("", "system message put before every chat prompt that has none")
    reward: str = setting("exact", "exact, numeric, math, or module:function or file.py:function")
    max_tokens: int = setting(512, "longest answer", unit="tokens")
    stop: list[str] = setting([], "strings that end the answer, beside the tokenizer's end of text")
    duplicates: Literal["keep_first", "keep_all", "error"] = setting(
        "keep_first", "what to do with a prompt that occurs twice; one in both splits is never trained on"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRow:
    """One problem: a row whose prompt and answer have been checked."""

    where: str
    key: str
    """the prompt as one text; rows with equal keys are the same problem"""
    prompt: Prompt
    data: Mapping[str, Any]


class Dataset(Task):
    """One turn: the prompt, the completion, the named reward of it against the row's answer.

    `problem.data` holds `answer` (text), `row` (the other fields) and `where` (file and line). Raises UserError for a
    file, row or field that is wrong. There are no demonstrations: an answer alone does not say how it is found.
    """

    name = "dataset"
    single_turn = True
    Settings = DatasetSettings

    def __init__(self, settings: DatasetSettings) -> None:
        if not settings.path:
            raise UserError("task.args.path is not set; name a .jsonl or .parquet file")
        if not 0 <= settings.eval_share < 1:
            raise UserError(f"task.args.eval_share is {settings.eval_share}; it must be at least 0 and below 1")
        if not settings.answer_field and settings.reward in ("exact", "numeric", "math"):
            raise UserError(
                f"task.args.answer_field is empty, but reward '{settings.reward}' needs an answer; name the field"
            )
        require_range("max_tokens", settings.max_tokens, 1, 10**7)
        if "" in settings.stop:
            raise UserError("task.args.stop holds an empty string, which would end every answer at once")
        self.settings: DatasetSettings = settings
        self.reward = make_reward(settings.reward)
        train, evaluated = self._split()
        self._train, self._eval = _problems(train), _problems(evaluated)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Empty only for the eval split, when `eval_share` is 0 and there is no `eval_path`."""
        return self._train if split == "train" else self._eval

    async def rollout(self, problem: Problem, session: Session) -> float:
        text = await session.generate(max_tokens=self.settings.max_tokens, stop=tuple(self.settings.stop))
        return await self.judge(text, problem, session)

    async def judge(self, text: str, problem: Problem, session: Session) -> float:
        """The reward of an episode that ends with the answer `text`."""
        if not session.stopped:
            session.end_at_token_limit()
        try:
            return await self.reward.score(text, problem.data["answer"], problem)
        except VerdictTimeout:
            # not a failure of the reward function: the answer could not be confirmed, so it earns nothing
            session.note("reward_timeout", 1.0)
            return 0.0

    def _split(self) -> tuple[list[CheckedRow], list[CheckedRow]]:
        path, eval_path = self.settings.path, self.settings.eval_path
        items = self._distinct(self._items(path, "task.args.path"), path)
        if eval_path:
            evaluated = self._distinct(self._items(eval_path, "task.args.eval_path"), eval_path)
            train = self._apart(items, evaluated)
        else:
            bound = self.settings.eval_share * SPLIT_BUCKETS
            train = [item for item in items if stable_hash(item.key) % SPLIT_BUCKETS >= bound]
            evaluated = [item for item in items if stable_hash(item.key) % SPLIT_BUCKETS < bound]
            if self.settings.eval_share and not evaluated:
                raise UserError(
                    f"none of the {len(items)} rows of {path} falls into the held-out share of "
                    f"{self.settings.eval_share}; raise task.args.eval_share, name an eval_path, or set it to 0"
                )
        if not train:
            raise UserError(f"no row of {path} is left to train on; lower task.args.eval_share or add rows")
        return train, evaluated

    def _items(self, path: str, setting_name: str) -> list[CheckedRow]:
        return [self._item(row) for row in read_rows(path, setting=setting_name)]

    def _item(self, row: Row) -> CheckedRow:
        prompt = self._prompt(row, _field(row, self.settings.prompt_field, "prompt_field"))
        name = self.settings.answer_field
        answer = self._answer(row, _field(row, name, "answer_field")) if name else ""
        rest = {key: value for key, value in row.values.items() if key not in (self.settings.prompt_field, name)}
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        return CheckedRow(
            where=row.where, key=key, prompt=prompt, data={"answer": answer, "row": rest, "where": row.where}
        )

    def _answer(self, row: Row, value: object) -> str:
        where = f"{row.where}: field '{self.settings.answer_field}'"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{where} is {value!r:.60}; an answer is text or a number")
        answer = str(value)
        if not answer.strip():
            raise UserError(f"{where} is empty")
        if self.settings.reward == "numeric" and last_number(answer) is None:
            raise UserError(f"{where} is {answer!r:.60}, which holds no number, as reward 'numeric' needs")
        return answer

    def _prompt(self, row: Row, value: object) -> Prompt:
        where = f"{row.where}: field '{self.settings.prompt_field}'"
        if isinstance(value, str):
            if not value.strip():
                raise UserError(f"{where} is empty")
            if not self.settings.as_chat:
                return value
            messages = [{"role": "user", "content": value}]
        elif isinstance(value, list):
            messages = [_message(where, number, message) for number, message in enumerate(value, start=1)]
            if not messages:
                raise UserError(f"{where} is an empty list; it needs at least one message")
        else:
            raise UserError(f"{where} is {value!r:.60}; a prompt is text or a list of chat messages")
        if self.settings.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.settings.system})
        return messages

    def _distinct(self, items: list[CheckedRow], path: str) -> list[CheckedRow]:
        """`items` without repeated prompts, unless `duplicates` keeps them."""
        if self.settings.duplicates == "keep_all":
            return items
        first: dict[str, CheckedRow] = {}
        for item in items:
            before = first.setdefault(item.key, item)
            if before is item:
                continue
            if before.data["answer"] != item.data["answer"]:
                raise UserError(
                    f"{item.where}: the prompt of {before.where} with another answer; mend one, or set "
                    "task.args.duplicates=keep_all"
                )
            if self.settings.duplicates == "error":
                raise UserError(
                    f"{item.where}: the same prompt as {before.where}; remove it, or set "
                    "task.args.duplicates=keep_first"
                )
        if len(first) < len(items):
            log.warning("%s: %d rows repeat a prompt and are left out", path, len(items) - len(first))
        return list(first.values())

    def _apart(self, items: list[CheckedRow], evaluated: list[CheckedRow]) -> list[CheckedRow]:
        """`items` without those that are evaluated, because the splits must not overlap."""
        held_out = {item.key: item.where for item in evaluated}
        train = [item for item in items if item.key not in held_out]
        if len(train) < len(items) and self.settings.duplicates == "error":
            shared = next(item for item in items if item.key in held_out)
            raise UserError(
                f"{shared.where}: the same prompt as {held_out[shared.key]}, which is held out; remove it, or set "
                "task.args.duplicates=keep_first"
            )
        if len(train) < len(items):
            log.warning(
                "%s: %d rows also stand in %s and are left out of training",
                self.settings.path, len(items) - len(train), self.settings.eval_path,
            )  # fmt: skip
        return train


def _field(row: Row, name: str, setting_name: str) -> object:
    if name not in row.values:
        raise UserError(
            f"{row.where}: no field '{name}' (task.args.{setting_name}); {nearest(name, map(str, row.values))}"
        )
    return row.values[name]


def _message(where: str, number: int, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}, message {number}: {message!r:.60} is not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UserError(f"{where}, message {number}: '{key}' must be text, it is {message.get(key)!r:.60}")
    return {"role": message["role"], "content": message["content"]}


def _problems(items: list[CheckedRow]) -> list[Problem]:
    return [Problem(index=index, prompt=item.prompt, data=item.data) for index, item in enumerate(items)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a file. Example: `Row(where="words.jsonl, line 3", values={"prompt": "1+1?", "answer": "2"})`."""

    where: str
    """file and line, for messages"""
    values: Mapping[str, Any]


def read_rows(path: str | Path, *, setting: str) -> list[Row]:
    """All rows of `path` (relative to the working directory), read by its ending `.jsonl` or `.parquet`.

    `setting` is the setting that named the file, for messages. Raises UserError for a missing, empty,
    unreadable or malformed file, naming the file and, for JSONL, the line.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{setting}: {file} is a folder; name a .jsonl or .parquet file in it")
    if not file.is_file():
        raise UserError(f"{setting}: there is no file {file} (relative paths start at {Path.cwd()})")
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            rows = list(_jsonl(file))
        case ".parquet":
            rows = list(_parquet(file))
        case other:
            raise UserError(f"{setting}: {file} ends in '{other}'; it must be a .jsonl or .parquet file")
    if not rows:
        raise UserError(f"{setting}: {file} holds no rows")
    return rows


def _jsonl(file: Path) -> Iterator[Row]:
    # Read as bytes, so that a bad character is reported with its line. Lines end with \n only: a JSON text may hold
    # U+2028, at which str.splitlines would cut.
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not line:
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); each line must hold one object") from None
            if not isinstance(values, dict):
                raise UserError(f"{where}: a {type(values).__name__}, not an object with named fields")
            yield Row(where=where, values=values)


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(where=f"{file}, row {number}", values=values)
