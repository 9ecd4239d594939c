"""Where in a row the prompt, the answer, tools and template arguments stand, and how they are checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any

from async_rl.task.chat import Message, in_envelope, message, sharegpt_message, text_of, tools_of, without_gaps
from async_rl.task.dataset_settings import DatasetSettings
from async_rl.task.fields import Field, parsed
from async_rl.task.generated import Prompt
from async_rl.task.reward import NAMES, last_number
from async_rl.task.rows import BadRow, Cells, Rows, Values

ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)
MANY_DIGITS = 100
CONTINUE = "continue_final_message"
"""argument by which a chat template, as transformers has it, leaves the last message open"""


ROLE_FIRST = ("role", "content")
Usual = tuple[str, str, Hashable]
"""(key, answer, form) of a row"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a row says."""

    prompt: Prompt
    answer: Any
    """text; a list of texts, of which any counts; for a reward of one's own also an object as the row has it"""
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any]
    """those of the row"""


class Layout:
    """How rows are read with some settings."""

    def __init__(self, settings: DatasetSettings) -> None:
        self._settings = settings
        self._prompt = Field(settings.prompt_field, setting="prompt_field")
        self._answer = Field(settings.answer_field, setting="answer_field")
        self._tools = Field(settings.tools_field, setting="tools_field")
        self._args = Field(settings.template_args_field, setting="template_args_field")
        self._system = Field(settings.system_field, setting="system_field")
        self._own = settings.reward not in NAMES
        self._message = sharegpt_message if settings.messages == "from_value" else message

    @property
    def continues(self) -> bool:
        """Whether the model goes on with a message of the assistant at the end of a chat."""
        return self._settings.continue_assistant

    @property
    def columns(self) -> list[str]:
        """Fields of a row that `read` looks at."""
        fields = (self._prompt, self._answer, self._tools, self._args, self._system)
        return [name for field in fields if field.name for name in (field.name, field.column)]

    def read(self, values: Values, rows: Rows) -> Read:
        """What a row says. `rows`: that it is of. Raises BadRow."""
        found = self._prompt.of(values)
        prompt = self._read_prompt(found, values, rows)
        answer: Any = ""
        if self._settings.answer_in_prompt:
            prompt, answer = self._taken_off(prompt)
        if self._settings.answer_field:
            answer = self._read_answer(self._answer.of(values), f"field '{self._settings.answer_field}'")
        tools, given = self._read_tools(values, rows), self._read_args(values, rows)
        if (tools or given) and isinstance(prompt, str):
            name = self._settings.tools_field if tools else self._settings.template_args_field
            raise BadRow(
                f"field '{name}' is for the chat template, and the prompt is text that is given as it is; "
                f"set task.args.as_chat=true, or task.args.{'tools' if tools else 'template_args'}_field=''"
            )
        return Read(prompt=prompt, answer=answer, tools=tools, template_args=given)

    def key(self, read: Read) -> str:
        """The prompt as one text; rows with equal keys are the same problem. Its hash decides the split, so it must
        stay the same in all versions."""
        prompt = read.prompt
        if isinstance(prompt, str):
            return prompt
        if is_short(read):  # what ENCODER writes, in a fifth of the time
            (one, its), (other, others) = prompt[0].items()
            return f'[{{"{one}": {encode_basestring(its)}, "{other}": {encode_basestring(others)}}}]'
        return ENCODER.encode([*prompt, *(part for part in (read.tools, read.template_args) if part)])

    def usual(self, rows: Rows) -> Callable[[Values], Usual | None]:
        """A function that reads the rows that most data sets are made of, in a third of the time: a text or a single
        message, an answer that is text or a whole number, nothing for the template. It gives None for all others, and
        what `read`, `key` and `form` would give for these."""
        chosen = self._settings
        plain = (
            chosen.messages == "role_content"
            and chosen.as_chat
            and not (chosen.answer_in_prompt or chosen.answer_after or chosen.system or chosen.system_field)
            and bool(chosen.answer_field)
            and not isinstance(rows, Cells)
        )
        if not plain or "." in chosen.prompt_field + chosen.tools_field + chosen.template_args_field:
            return lambda values: None
        field, tools, args = chosen.prompt_field, chosen.tools_field, chosen.template_args_field
        numeric, name, answer_of = chosen.reward == "numeric", chosen.answer_field, self._answer.get
        whole = "." not in name

        def read(values: Values) -> Usual | None:
            prompt = values.get(field)
            if type(prompt) is str:
                if not prompt or prompt.isspace():
                    return None
                order, role, text = ROLE_FIRST, "user", prompt
            elif type(prompt) is list and len(prompt) == 1 and type(prompt[0]) is dict and len(prompt[0]) == 2:
                order = tuple(prompt[0])
                said, content = prompt[0].get("role"), prompt[0].get("content")
                if type(said) is not str or type(content) is not str or said == "assistant":
                    return None
                role, text = said, content
            else:
                return None
            answer = values.get(name) if whole else answer_of(values)
            if type(answer) is int:
                answer = str(answer)
            if type(answer) is not str or not answer or answer.isspace():
                return None
            if numeric and not is_whole(answer):
                return None
            if values.get(tools) or values.get(args):
                return None
            first, second = (role, text) if order == ROLE_FIRST else (text, role)
            key = f'[{{"{order[0]}": {encode_basestring(first)}, "{order[1]}": {encode_basestring(second)}}}]'
            return key, answer, (*order, role)

        return read

    def form(self, read: Read) -> Hashable:
        """Rows of one form are alike for a chat template: the same roles, fields and kinds of content, ..."""
        if isinstance(read.prompt, str):
            return None
        if is_short(read):
            return (*read.prompt[0], read.prompt[0]["role"])
        said = [(m.get("role"), isinstance(m.get("content"), str), *m) for m in read.prompt]
        return (frozenset(said), bool(read.tools), *read.template_args)

    def args(self, read: Read) -> Mapping[str, Any]:
        """Arguments of the chat template."""
        more = {CONTINUE: True} if self._settings.continue_assistant and ends_open(read) else {}
        return {**self._settings.template_args, **read.template_args, **more}

    def rest(self, values: Values) -> dict[str, Any]:
        """The other fields, for rewards."""
        taken = (self._settings.prompt_field, self._settings.answer_field)
        return {name: value for name, value in values.items() if name not in taken}

    # ------------------------------------------------------------------------------------------------ prompt

    def _read_prompt(self, value: object, values: Values, rows: Rows) -> Prompt:
        if isinstance(value, str) and isinstance(rows, Cells):
            value = _messages_in(value)
        if isinstance(value, str):
            if not value.strip():
                raise BadRow(f"field '{self._settings.prompt_field}' is empty")
            if not self._settings.as_chat:
                return value
            messages: list[Message] = [{"role": "user", "content": value}]
        elif isinstance(value, list):
            if not value:
                raise BadRow(f"field '{self._settings.prompt_field}' is an empty list; it needs at least one message")
            try:
                messages = [self._message(number, m, rows.has_gaps) for number, m in enumerate(value, 1)]
            except BadRow as bad:
                raise BadRow(f"field '{self._settings.prompt_field}', {bad}") from None
        else:
            raise BadRow(
                f"field '{self._settings.prompt_field}' is {value!r:.60}; a prompt is text or a list of chat messages"
            )
        system = self._system.get(values)
        system = system if isinstance(system, str) and system.strip() else self._settings.system
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def _taken_off(self, prompt: Prompt) -> tuple[Prompt, str]:
        """(the prompt without the assistant's last message, what that says)."""
        name = self._settings.prompt_field
        if isinstance(prompt, str):
            raise BadRow(f"field '{name}' is text; task.args.answer_in_prompt needs chat messages, the last its answer")
        last = prompt[-1]
        if last["role"] != "assistant":
            raise BadRow(f"field '{name}' ends with a message of the {last['role']}, not with the assistant's answer")
        if not any(said["role"] != "system" for said in prompt[:-1]):
            raise BadRow(f"field '{name}' has nothing before the assistant's answer")
        text = text_of(last)
        if not text.strip():
            raise BadRow(f"field '{name}' ends with a message without text, which is no answer")
        return prompt[:-1], self._checked(self._cut(text, "the last message"), "the last message")

    # ------------------------------------------------------------------------------------------------ answer

    def _read_answer(self, value: object, where: str) -> Any:
        if isinstance(value, list) and value and not (self._own and any(isinstance(v, list | dict) for v in value)):
            return [self._one_answer(one, where) for one in value]
        if self._own and isinstance(value, Mapping | list) and value:
            return value
        return self._one_answer(value, where)

    def _one_answer(self, value: object, where: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadRow(f"{where} is {value!r:.60}; an answer is text or a number, or a list of them")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(f"{where} is {value}, which is no number")
        answer = str(value)
        if not answer.strip():
            raise BadRow(f"{where} is empty")
        return self._checked(self._cut(answer, where), where)

    def _cut(self, answer: str, where: str) -> str:
        """What stands behind the last `answer_after`."""
        mark = self._settings.answer_after
        if not mark:
            return answer
        _, found, behind = answer.rpartition(mark)
        if not found or not behind.strip():
            raise BadRow(f"{where} has nothing behind '{mark}' (task.args.answer_after): {answer[-60:]!r}")
        return behind.strip()

    def _checked(self, answer: str, where: str) -> str:
        if self._settings.reward == "numeric" and not is_whole(answer) and last_number(answer) is None:
            raise BadRow(f"{where} is {answer!r:.60}, which holds no number, as reward 'numeric' needs")
        return answer

    # ------------------------------------------------------------------------------------------------ template

    def _read_tools(self, values: Values, rows: Rows) -> Sequence[Mapping[str, Any]]:
        found = self._tools.get(values)
        if not found:
            return ()
        tools = tools_of(found, self._settings.tools_field, rows.has_gaps)
        return [in_envelope(tool) for tool in tools] if self._settings.messages == "from_value" else tools

    def _read_args(self, values: Values, rows: Rows) -> Mapping[str, Any]:
        found = self._args.get(values)
        if not found:
            return NO_ARGS
        found = parsed(found)
        if not isinstance(found, Mapping):
            name = self._settings.template_args_field
            raise BadRow(
                f"field '{name}' is {found!r:.60}, not an object with arguments of the chat template; "
                "correct it, or set task.args.template_args_field=''"
            )
        return without_gaps(found) if rows.has_gaps else found

    @cached_property
    def counts_floats(self) -> bool:
        """Whether `is_whole_float` is worth asking."""
        return self._settings.reward == "exact" and bool(self._settings.answer_field)

    def is_whole_float(self, values: Values) -> bool:
        """The answer is a number such as 3.0, which `exact` wants as `3.0` and not as `3`."""
        found = self._answer.get(values)
        return isinstance(found, float) and found.is_integer()


NO_ARGS: Mapping[str, Any] = {}


def is_whole(answer: str) -> bool:
    """Whether it is a whole number, known without `last_number`."""
    return answer.isascii() and answer.isdigit() and len(answer) < MANY_DIGITS


def is_short(read: Read) -> bool:
    """The prompt is one message with role and content, both text, and nothing else for the template."""
    prompt = read.prompt
    return (
        len(prompt) == 1
        and not isinstance(prompt, str)
        and not read.tools
        and not read.template_args
        and len(prompt[0]) == 2
        and isinstance(prompt[0].get("content"), str)
    )


def ends_open(read: Read) -> bool:
    """The prompt ends with a message of the assistant."""
    return not isinstance(read.prompt, str) and read.prompt[-1].get("role") == "assistant"


def _messages_in(cell: str) -> object:
    """Chat messages that a cell of a CSV file holds as JSON text; else the text."""
    found = parsed(cell) if cell.lstrip()[:1] == "[" else cell
    chat = (
        isinstance(found, list)
        and found
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in found)
    )
    return found if chat else cell
