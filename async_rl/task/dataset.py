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
    prompt_field: str = setting(
        "prompt", "field with the prompt: text, or chat messages (role, content, tool_calls and what else they have)"
    )
    answer_field: str = setting("answer", "field with the answer; empty: the rows have none (reward of your own)")
    as_chat: bool = setting(True, "make a text prompt the user's message of a chat; no: give it as it is")
    system: str = setting("", "system message put before every chat prompt that has none")
    tools_field: str = setting("tools", "field with the tools that the chat template describes, where a row has one")
    template_args: dict[str, Any] = setting({}, "further arguments of the chat template, e.g. {enable_thinking: false}")
    template_args_field: str = setting(
        "chat_template_kwargs", "field with such arguments of a row, which come before `template_args`"
    )
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
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any]


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
        tools, given = self._tools(row), self._template_args(row)
        if (tools or given) and isinstance(prompt, str):
            name = self.settings.tools_field if tools else self.settings.template_args_field
            raise UserError(
                f"{row.where}: field '{name}' is for the chat template, and the prompt is text that is given as it is; "
                f"set task.args.as_chat=true, or task.args.{'tools' if tools else 'template_args'}_field=''"
            )
        more = [part for part in (tools, given) if part]
        key = prompt if isinstance(prompt, str) else json.dumps([*prompt, *more], ensure_ascii=False, default=str)
        return CheckedRow(
            where=row.where,
            key=key,
            prompt=prompt,
            data={"answer": answer, "row": rest, "where": row.where},
            tools=tools,
            template_args={**self.settings.template_args, **given},
        )

    def _tools(self, row: Row) -> list[Mapping[str, Any]]:
        """The tools of a row: a list of objects, or the JSON text of one."""
        found = _parsed(row.values.get(self.settings.tools_field) if self.settings.tools_field else None)
        if found is None or found == "":
            return []
        if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
            raise UserError(
                f"{row.where}: field '{self.settings.tools_field}' is {found!r:.60}, not a list of tools for the chat "
                "template; correct it, or set task.args.tools_field to the right field, or to ''"
            )
        return [_without_gaps(tool) if row.has_gaps else tool for tool in found]

    def _template_args(self, row: Row) -> Mapping[str, Any]:
        name = self.settings.template_args_field
        found = _parsed(row.values.get(name) if name else None)
        if found is None or found == "":
            return {}
        if not isinstance(found, Mapping):
            raise UserError(
                f"{row.where}: field '{name}' is {found!r:.60}, not an object with arguments of the chat template; "
                "correct it, or set task.args.template_args_field=''"
            )
        return _without_gaps(found) if row.has_gaps else found

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
            messages: list[Mapping[str, Any]] = [{"role": "user", "content": value}]
        elif isinstance(value, list):
            messages = [_message(where, number, message, row.has_gaps) for number, message in enumerate(value, 1)]
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


def _message(where: str, number: int, message: object, has_gaps: bool) -> Mapping[str, Any]:
    """A chat message with all its fields, checked."""
    where = f"{where}, message {number}"
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: {message!r:.60} is not an object with role and content")
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where}: 'role' must be text, it is {message.get('role')!r:.60}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{where}: 'content' must be text, it is {content!r:.60}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise UserError(f"{where}: 'tool_calls' must be a list of objects, it is {calls!r:.60}")
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    return _without_gaps(kept) if has_gaps else kept


def _check_part(where: str, part: object) -> None:
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: a part of 'content' must be text or an object, it is {part!r:.60}")
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"{where}: a part of 'content' is of type {part.get('type')!r:.40}; only text can be given")


def _without_gaps(values: Any) -> Any:
    """Without the fields that are None: where objects differ in their fields, Arrow gives each of them all."""
    if isinstance(values, Mapping):
        return {k: _without_gaps(v) for k, v in values.items() if v is not None or k == "content"}
    return [_without_gaps(value) for value in values] if isinstance(values, list) else values


def _parsed(value: object) -> object:
    """A list or an object, also where it is stored as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _problems(items: list[CheckedRow]) -> list[Problem]:
    return [
        Problem(index=i, prompt=row.prompt, data=row.data, tools=row.tools, template_args=row.template_args)
        for i, row in enumerate(items)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a file. Example: `Row(where="words.jsonl, line 3", values={"prompt": "1+1?", "answer": "2"})`."""

    where: str
    """file and line, for messages"""
    values: Mapping[str, Any]
    has_gaps: bool = False
    """fields that an object of a list has not are None, because others of the list have them"""


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
        yield Row(where=f"{file}, row {number}", values=values, has_gaps=True)
