"""A request for a chat completion in OpenAI's form, and the answer to it.

Source: OpenAI's API reference (chat completions) and the types of its `openai` package; where vLLM's server knows more
(`chat_template_kwargs`, `stop_token_ids`, `return_token_ids`), the names are vLLM's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from async_rl.model.tokenizer import Tokenizer
from async_rl.task.tool_formats import FORMATS, Parsed, ToolCall, call_id, detect

Message = Mapping[str, Any]
MODEL = "policy"
"""the model's name"""
ROLES = ("system", "developer", "user", "assistant", "tool")
READ = (
    "model", "messages", "tools", "tool_choice", "temperature", "max_tokens", "max_completion_tokens", "stop", "stream",
    "stream_options", "n", "logprobs", "top_logprobs", "chat_template_kwargs", "stop_token_ids", "return_token_ids",
    "agent",
)  # fmt: skip
"""parameters that are followed"""
WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "seed", "parallel_tool_calls", "reasoning_effort", "verbosity",
)  # fmt: skip
"""parameters that are accepted and change nothing: they do not concern what is sampled, or only advise. `seed`: an
episode has its own"""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""parameters with the values that are accepted. Others would sample from another distribution than the one whose
log-probs are recorded, or ask for what is not there"""


class RequestError(Exception):
    """What is wrong with a request, in OpenAI's form."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", param: str = "", code: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param or None, "code": code or None}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request that can be served."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    calls: bool = False
    """calls are read out of the answer"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the chat template"""
    max_tokens: int | None = None
    """None: as many as the context holds"""
    temperature: float | None = None
    """None: that of the run"""
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stream: bool = False
    usage: bool = False
    """a stream ends with the numbers of tokens"""
    log_probs: bool = False
    token_ids: bool = False
    agent: str = ""


def read_request(body: Any) -> ChatRequest:
    """Check a request's JSON. Raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise RequestError(
                f"'{name}' is {value!r:.60}, and this endpoint takes only {NEUTRAL[name][0]!r}: it samples from the "
                "model's whole distribution, of which the log-probs are recorded",
                param=name,
                code="unsupported_value",
            )
        if name not in READ and name not in WITHOUT_EFFECT and name not in NEUTRAL:
            raise RequestError(f"'{name}' is not known here", param=name, code="unknown_parameter")
    tools, choice = given.get("tools", []), given.get("tool_choice", "auto")
    if choice not in ("none", "auto"):
        raise RequestError(
            "'tool_choice' can be none or auto: forcing a call would change the distribution that is sampled from",
            param="tool_choice",
            code="unsupported_value",
        )
    options = _of_type(given, "stream_options", dict, {})
    return ChatRequest(
        messages=_messages(given.get("messages")),
        tools=tuple(_objects(tools, "tools")),
        calls=bool(tools) and choice == "auto",
        arguments=_of_type(given, "chat_template_kwargs", dict, {}),
        max_tokens=_max_tokens(given),
        temperature=_temperature(given),
        stop=_stop(given),
        stop_tokens=_stop_tokens(given),
        stream=_of_type(given, "stream", bool, False),
        usage=bool(options.get("include_usage", False)),
        log_probs=_of_type(given, "logprobs", bool, False),
        token_ids=_of_type(given, "return_token_ids", bool, False),
        agent=_of_type(given, "agent", str, ""),
    )


def _of_type(given: Mapping[str, Any], name: str, kind: type, otherwise: Any) -> Any:
    value = given.get(name, otherwise)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RequestError(f"'{name}' is {value!r:.60}, not of type {kind.__name__}", param=name)
    return value


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if name not in given:
        return None
    value: int = _of_type(given, name, int, 0)
    if value < 1:
        raise RequestError(f"'{name}' is {value}; it must be at least 1", param=name)
    return value


def _temperature(given: Mapping[str, Any]) -> float | None:
    value = given.get("temperature")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RequestError(f"'temperature' is {value!r:.60}; it must be a number from 0 on", param="temperature")
    return float(value)


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", [])
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise RequestError("'stop' must be a text or a list of texts, none of them empty", param="stop")
    return tuple(strings)


def _stop_tokens(given: Mapping[str, Any]) -> tuple[int, ...]:
    value = given.get("stop_token_ids", [])
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise RequestError("'stop_token_ids' must be a list of tokens", param="stop_token_ids")
    return tuple(value)


def _objects(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RequestError(f"'{name}' must be a list of objects", param=name)
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not value:
        raise RequestError("'messages' is empty", param="messages")
    return tuple(_message(number, message) for number, message in enumerate(_objects(value, "messages")))


def _message(number: int, message: Message) -> Message:
    """A message without empty fields, its content one text."""
    where = f"messages[{number}]"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}: the role is {role!r:.40}; known: {', '.join(ROLES)}", param=where)
    if isinstance(content, list):
        content = "\n".join(_part(where, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise RequestError(f"{where}: the content is {content!r:.40}, not text", param=where)
    calls = message.get("tool_calls") or []
    if content is None and not calls and role != "assistant":
        raise RequestError(f"{where}: there is no content", param=where)
    kept = {name: value for name, value in message.items() if name in ("name", "tool_call_id") and value is not None}
    made = {"role": role, "content": content or "", **kept}
    return made | {"tool_calls": [_call(where, call) for call in _objects(calls, where)]} if calls else made


def _part(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("text", "refusal") or not isinstance(text, str):
        raise RequestError(f"{where}: a part of type {kind!r:.40}; only text can be given", param=where)
    return text


def _call(where: str, call: Message) -> Message:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}: a tool call without a function's name", param=where)
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    named = {"name": function["name"], "arguments": text}
    return {"id": str(call.get("id", "")), "type": "function", "function": named}


# ------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A sampled turn, as it is sent to the agent."""

    message: Message
    """role, content, perhaps reasoning_content and tool_calls"""
    finish: Literal["stop", "length", "tool_calls"]
    prompt: Sequence[int]
    """tokens before the turn"""
    tokens: Sequence[int]
    log_probs: Sequence[float]


def as_message(text: str, request: ChatRequest, tokenizer: Tokenizer, *, first_id: int, opened: bool) -> dict[str, Any]:
    """The text of a turn as a message: calls, where the request has tools, and thoughts apart.

    Calls that cannot be read are left in the text.

    Args:
        first_id: number of calls that the episode had before.
        opened: the prompt ended with the opening tag of a thought.
    """
    name = detect(tokenizer.template_text)
    parsed = FORMATS[name].parse(text, request.tools, opened) if name else Parsed(content=text)
    if parsed.calls and (not request.calls or any(call.error for call in parsed.calls)):
        parsed = Parsed(content=parsed.unread, thinking=parsed.thinking)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.thinking:
        message["reasoning_content"] = parsed.thinking
    if parsed.calls:
        message["tool_calls"] = [_called(call, first_id + i) for i, call in enumerate(parsed.calls)]
    return message


def _called(call: ToolCall, number: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id(number), "type": "function", "function": function}


def completion(answer: Answer, request: ChatRequest, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """The body of an answer. `name`: its id."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"refusal": None, **answer.message, "content": answer.message["content"] or None},
        "logprobs": log_probs_of(answer, tokenizer) if request.log_probs else None,
        "finish_reason": answer.finish,
    }
    body = {"id": name, "object": "chat.completion", "created": int(time.time()), "model": MODEL}
    if request.token_ids:
        choice["token_ids"] = list(answer.tokens)
        body["prompt_token_ids"] = list(answer.prompt)
    return {**body, "choices": [choice], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    """Numbers of tokens."""
    prompt, sampled = len(answer.prompt), len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def log_probs_of(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The log-prob of every sampled token, the end token included."""
    found = []
    for token, log_prob in zip(answer.tokens, answer.log_probs, strict=True):
        text = tokenizer.decode([token], special=True, behind=True)
        entry = {"token": text, "logprob": log_prob, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        found.append(entry)
    return {"content": found, "refusal": None}
