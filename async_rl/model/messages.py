"""Chat messages in the form that a chat template takes, and as lines where there is no template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from async_rl.errors import UserError

Message = Mapping[str, Any]


def with_text(message: Message, where: str) -> Message:
    """The message, its parts joined to one text. `where`: the model folder, for messages. Raises UserError for a part
    that is no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(text_of(part, where) for part in content)}


def text_of(part: Any, where: str) -> str:
    """The text of a part of a message. Raises UserError for one that is no text."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise UserError(f"{where}: the chat template shows no part of type {kind!r:.40}; only text can be given")


def with_arguments(message: Message, *, as_text: bool) -> Message:
    """The message, the arguments of its tool calls as JSON text or as an object, whichever the template takes. A
    template that writes objects as JSON would write a text in quotes."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call, as_text) for call in calls]}


def without_last_call(message: Message) -> Message:
    """The message without the last of its tool calls; without the field where there was one call."""
    left = message["tool_calls"][:-1]
    return {k: left if k == "tool_calls" else v for k, v in message.items() if k != "tool_calls" or left}


def _call(call: Any, as_text: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text)}
    given = call.get("arguments")
    if as_text and isinstance(given, Mapping):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if not as_text and isinstance(given, str):
        try:
            read = json.loads(given)
        except ValueError:
            return call
        return {**call, "arguments": read} if isinstance(read, dict) else call
    return call


def plain_lines(
    prompt: Sequence[Message], tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], where: str
) -> Iterator[str]:
    """What the messages say, a line a message. Raises UserError for what only a chat template could show."""
    missing = f"{where}: the tokenizer has no chat template, which"
    refuse(tools, f"{missing} tools need; use a chat model, or leave the tools out")
    refuse(arguments, f"{missing} its arguments need; leave them out")
    for number, message in enumerate(prompt, start=1):
        for name in sorted(message.keys() - {"role", "content"}):
            refuse(message[name], f"{missing} '{name}' of message {number} needs; use a chat model, or leave it out")
        content = message.get("content")
        parts = content if isinstance(content, list) else [content or ""]
        yield "\n".join(text_of(part, where) for part in parts)


def refuse(given: Any, reason: str) -> None:
    """Raises UserError when anything is given."""
    if given:
        raise UserError(reason)
