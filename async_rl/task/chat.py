"""Chat messages of a row, checked: OpenAI's form (role, content) and ShareGPT's (from, value)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from async_rl.task.fields import parsed
from async_rl.task.rows import BadRow

Message = Mapping[str, Any]
SHAREGPT_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
    "system": "system",
}  # fmt: skip
"""`from` of a ShareGPT message -> role, as LLaMA-Factory, Axolotl and Unsloth read it"""
CALLS = ("function_call", "tool_call")


def message(number: int, given: object, has_gaps: bool) -> Message:
    """A message with all its fields. `number`: of the message, from 1; for messages. Raises BadRow."""
    if not isinstance(given, Mapping):
        raise BadRow(f"message {number}: {given!r:.60} is not an object with role and content")
    if not isinstance(given.get("role"), str):
        raise BadRow(f"message {number}: 'role' must be text, it is {given.get('role')!r:.60}")
    content = given.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(number, part)
    elif not isinstance(content, str) and not (content is None and given.get("tool_calls")):
        raise BadRow(f"message {number}: 'content' must be text, it is {content!r:.60}")
    calls = given.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow(f"message {number}: 'tool_calls' must be a list of objects, it is {calls!r:.60}")
    kept = {name: value for name, value in given.items() if value is not None or name == "content"}
    return without_gaps(kept) if has_gaps else kept


def sharegpt_message(number: int, given: object, has_gaps: bool) -> Message:
    """A ShareGPT message as one with role and content. Raises BadRow."""
    if not isinstance(given, Mapping):
        raise BadRow(f"message {number}: {given!r:.60} is not an object with from and value")
    said_by, value = given.get("from"), given.get("value")
    if said_by is None and "role" in given:
        return message(number, given, has_gaps)  # some files of this kind have OpenAI's messages here and there
    if said_by not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise BadRow(f"message {number}: 'from' is {said_by!r:.60}; known: {known}")
    if not isinstance(value, str):
        raise BadRow(f"message {number}: 'value' must be text, it is {value!r:.60}")
    if said_by in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(number, value)}
    return {"role": SHAREGPT_ROLES[said_by], "content": value}


def text_of(said: Message) -> str:
    """What a message says, its parts joined."""
    content = said.get("content")
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else str(part["text"]) for part in content)
    return content or ""


def tools_of(given: object, field: str, has_gaps: bool) -> list[Mapping[str, Any]]:
    """Tools for the chat template, from a list of objects or its JSON text. Raises BadRow."""
    found = parsed(given)
    if found is None or found == "":
        return []
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise BadRow(
            f"field '{field}' is {found!r:.60}, not a list of tools for the chat template; correct it, or set "
            "task.args.tools_field to the right field, or to ''"
        )
    return [without_gaps(tool) if has_gaps else tool for tool in found]


def in_envelope(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """`{"name": ..., "parameters": ...}` as templates expect it: `{"type": "function", "function": {...}}`."""
    if "name" in tool and "function" not in tool and tool.get("type", "function") == "function":
        return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    return tool


def without_gaps(values: Any) -> Any:
    """Without the fields that are None: where objects differ in their fields, Arrow gives each of them all."""
    if isinstance(values, Mapping):
        return {k: without_gaps(v) for k, v in values.items() if v is not None or k == "content"}
    return [without_gaps(value) for value in values] if isinstance(values, list) else values


def _check_part(number: int, part: object) -> None:
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping):
        raise BadRow(f"message {number}: a part of 'content' must be text or an object, it is {part!r:.60}")
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise BadRow(
            f"message {number}: a part of 'content' is of type {part.get('type')!r:.40}; only text can be given"
        )


def _calls(number: int, value: str) -> Sequence[Mapping[str, Any]]:
    """The calls that a `function_call` message writes as JSON: one, or a list of them."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(f"message {number}: {value!r:.60} is not a call written as JSON with name and arguments")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": parsed(call.get("arguments", {}))}}
        for call in calls
    ]
