"""How models write tool calls: one parser per format, each from text to calls.

The text is that of a whole turn with its special tokens in it and without the end token, as `Session.generate` returns
it. So it does not matter how a tag was tokenised: as a special token, as several tokens, or together with what follows.

    name = detect(chat_template)              # "hermes"; "" where the template shows no format known here
    parsed = FORMATS[name].parse(text, tools) # .content, .thinking, .calls
    message = parsed.message()                # the same turn as a chat message

Formats and where they are written down: `hermes` (Qwen 2.5 and 3, Hermes, Granite 4; their chat templates), `qwen_xml`
(Qwen3-Coder, Nemotron 3; chat templates), `llama` (Llama 3.1 to 3.3; model card "tool calling"), `mistral` (before and
since tokenizer v11; mistral-common), `deepseek` (V3, R1, V3.1; chat templates), `harmony` (gpt-oss; openai-harmony).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Tools = Sequence[Mapping[str, Any]]
"""descriptions of tools (JSON schema, as the chat template takes them)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that the model wrote."""

    name: str
    """of the tool; empty where it cannot be read"""
    arguments: str = "{}"
    """JSON text of an object; what the model wrote, where `error` says that it is none"""
    error: str = ""
    """why the call cannot be done (malformed JSON, no name), in words that the model is answered with"""

    def values(self) -> dict[str, Any]:
        """The arguments. Empty for a call with an error."""
        return {} if self.error else dict(json.loads(self.arguments))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A turn in its parts."""

    content: str
    """what is said to the user: the text without calls, thoughts and the format's own tags"""
    thinking: str = ""
    """what the model thought before it spoke (`<think>` or the analysis channel)"""
    calls: tuple[ToolCall, ...] = ()
    """in the order in which they were written"""
    unread: str = ""
    """`content`, the calls left in it as they were written"""

    def message(self, *, first_id: int = 0) -> dict[str, Any]:
        """The turn as a chat message (OpenAI's form): role, content, `tool_calls` with arguments as JSON text.
        `first_id`: calls that the conversation had before; ids are `call_id` of the numbers from there."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            made["tool_calls"] = [
                {
                    "id": call_id(first_id + i),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for i, call in enumerate(self.calls)
            ]
        return made


TAGS = ("<think>", "</think>")
"""around a thought"""


class Parse(Protocol):
    """Reads a turn. Never raises: a call that cannot be read has an `error`."""

    def __call__(self, text: str, tools: Tools = (), opened: bool | None = None) -> Parsed:
        """
        Args:
            text: of the turn.
            tools: that the prompt described.
            opened: the prompt ended with the opening tag of a thought; None: not known. Then a closing tag says so.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    marks: tuple[str, ...]
    """what the chat templates of such models hold, all of them"""
    without: tuple[str, ...] = ()
    """what they do not hold: marks of other formats that share `marks`"""
    stop: tuple[str, ...] = ()
    """strings that end a turn of calls, for folders that do not name these tokens as end tokens"""
    opens: tuple[str, ...] = ()
    """what a call begins with: the first of these ends a thought that was not closed"""
    thinks: tuple[str, str] = TAGS
    """tags around a thought"""
    parse: Parse
    write: Callable[[str, str], str]
    """(name, arguments as JSON text) -> the turn that a model writes to make this call"""

    def written_in(self, template: str) -> bool:
        """Whether a chat template is of this format."""
        return all(m in template for m in self.marks) and not any(m in template for m in self.without)


def detect(template: str) -> str:
    """Name of the format that a chat template teaches (its text, or several joined); empty where it teaches none that
    is known here."""
    return next((f.name for f in FORMATS.values() if f.written_in(template)), "")


def call_id(number: int) -> str:
    """The id of an episode's call: nine letters and digits, which is what Mistral's templates ask for."""
    return f"call{number:05d}"


def _readable(value: Any, text: str) -> ToolCall:
    """A call from the JSON object that names it and its arguments."""
    if not isinstance(value, dict):
        return ToolCall(name="", arguments=text, error="the call is no JSON object with name and arguments")
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return ToolCall(name="", arguments=text, error="the call names no tool")
    return _with_arguments(name, value.get("arguments", value.get("parameters")), text)


def _with_arguments(name: str, found: Any, text: str) -> ToolCall:
    if isinstance(found, str):  # some models write the object as a text
        try:
            found = json.loads(found) if found.strip() else {}
        except ValueError as error:
            return ToolCall(name=name, arguments=text, error=f"the arguments are not valid JSON: {error}")
    if found is None:
        found = {}
    if not isinstance(found, dict):
        return ToolCall(name=name, arguments=text, error="the arguments are no JSON object")
    return ToolCall(name=name, arguments=json.dumps(found, ensure_ascii=False))


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` (white space skipped) and where it ends. Raises ValueError."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value, end


def _written(text: str, start: int) -> tuple[tuple[ToolCall, ...], int]:
    """The calls that a JSON object, or a list of them, holds from `start` on, and where it ends. Raises ValueError."""
    value, end = _decoded(text, start)
    several = value if isinstance(value, list) else [value]
    return tuple(_readable(one, text[start:end].strip()) for one in several), end


def _object(name: str, text: str, start: int, stop: int) -> tuple[ToolCall, int]:
    """A call whose arguments begin at `start`; where they cannot be read, they are taken to end at `stop`."""
    if not text[start:stop].strip():
        return ToolCall(name=name), stop
    try:
        value, end = _decoded(text, start)
    except ValueError as error:
        wrong = f"the arguments are not valid JSON: {error}"
        return ToolCall(name=name, arguments=text[start:stop].strip(), error=wrong), stop
    call = _with_arguments(name, value, text[start:end].strip())
    return (call if name else ToolCall(name="", arguments=call.arguments, error="the call names no tool")), end


def _find(text: str, mark: str, start: int) -> int:
    """Where `mark` stands at or behind `start`; the end of the text without it."""
    found = text.find(mark, start)
    return found if found >= 0 else len(text)


def _thought(text: str, opening: str, opened: bool | None, tags: tuple[str, str]) -> tuple[str, str]:
    """(what was thought, the rest). A thought ends at its closing tag; a call that is opened in one that never was
    ends it too, and one that the prompt opened has no opening tag here."""
    begin, end = tags
    body = text.lstrip()
    if body.startswith(begin):
        body, opened = body[len(begin) :], True
    closed = body.find(end)
    call = body.find(opening)
    if closed >= 0 and (opened or (opened is None and (call < 0 or closed < call))):
        return body[:closed].strip("\n"), body[closed + len(end) :].lstrip("\n")
    if opened:
        call = call if call >= 0 else len(body)
        return body[:call].strip("\n"), body[call:]
    return "", text


def _between(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text outside the spans, which are in order."""
    if not spans:
        return text
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)).strip()


Spans = Iterator[tuple[int, int, tuple[ToolCall, ...]]]
"""(begin, end, calls in it), in order"""


def _parser(opening: str, spans: Callable[[str, Tools], Spans], tags: tuple[str, str] = TAGS) -> Parse:
    """A parser for calls that stand between tags in text, perhaps behind a thought."""

    def parse(text: str, tools: Tools = (), opened: bool | None = None) -> Parsed:
        thinking, rest = _thought(text, opening, opened, tags)
        found = list(spans(rest, tools))
        content = _between(rest, [(begin, end) for begin, end, _ in found])
        calls = tuple(call for _, _, several in found for call in several)
        return Parsed(content=content, thinking=thinking, calls=calls, unread=rest)

    return parse


# ------------------------------------------------ hermes: <tool_call>{"name": ..., "arguments": {...}}</tool_call>

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def _hermes(text: str, tools: Tools) -> Spans:
    at = text.find(OPEN)
    while at >= 0:
        begin = at + len(OPEN)
        try:
            calls, end = _written(text, begin)
            stop = _find(text, CLOSE, end)
            if text[end : min(stop, _find(text, OPEN, end))].strip():
                raise ValueError("more follows behind it")
        except ValueError as error:
            stop = min(_find(text, CLOSE, begin), _find(text, OPEN, begin))
            wrong = f"the call is not valid JSON: {error}"
            calls = (ToolCall(name="", arguments=text[begin:stop].strip(), error=wrong),)
        end = stop + len(CLOSE) if text.startswith(CLOSE, stop) else min(stop, len(text))
        yield at, end, calls
        at = text.find(OPEN, end)


def _write_hermes(name: str, arguments: str) -> str:
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}'


# ------------------------------------------------ qwen_xml: <function=name><parameter=key>value</parameter></function>

_FUNCTION = re.compile(r"(?:<tool_call>\s*)?<function=([^>\n]*)>(.*?)(?:</function>\s*(?:</tool_call>)?|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,), "array": (list,),
    "null": (type(None),),
}  # fmt: skip


def _qwen_xml(text: str, tools: Tools) -> Spans:
    for found in _FUNCTION.finditer(text):
        name = found[1].strip()
        schema = _parameters(name, tools)
        values = {
            key.strip(): _typed(_unwrapped(value), schema.get(key.strip()))
            for key, value in _PARAMETER.findall(found[2])
        }
        call = ToolCall(name=name, arguments=json.dumps(values, ensure_ascii=False))
        if not name:
            call = ToolCall(name="", arguments=call.arguments, error="the call names no tool")
        yield found.start(), found.end(), (call,)


def _parameters(name: str, tools: Tools) -> Mapping[str, Any]:
    """Schemas of a tool's parameters."""
    for tool in tools:
        described = tool.get("function", tool)
        if isinstance(described, Mapping) and described.get("name") == name:
            properties = (described.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _unwrapped(value: str) -> str:
    """Without the line breaks that the format puts around a value."""
    return value.removeprefix("\n").removesuffix("\n")


def _typed(value: str, schema: Any) -> Any:
    """A value of the type that the tool's description names; as text where it has none or is none of it."""
    named = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = named if isinstance(named, list) else [named]
    if "string" in kinds:
        return value
    allowed = tuple(t for kind in kinds if isinstance(kind, str) for t in _TYPES.get(kind, ()))
    try:
        read = json.loads(value.strip().lower() if bool in allowed else value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, allowed) and (bool in allowed or not isinstance(read, bool)) else value


def _write_qwen_xml(name: str, arguments: str) -> str:
    values = json.loads(arguments).items()
    lines = [
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in values
    ]
    return f"{OPEN}\n<function={name}>\n{''.join(lines)}</function>\n{CLOSE}"


# ------------------------------------------------ llama: {"name": ..., "parameters": {...}}, or behind <|python_tag|>

PYTHON_TAG = "<|python_tag|>"
_CALL_BEGINS = re.compile(r'\{\s*"(?:name|type|function)"\s*:')
_BUILT_IN = re.compile(r"\s*([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.call\(.*\)\s*", re.DOTALL)


def _llama(text: str, tools: Tools) -> Spans:
    tag = text.find(PYTHON_TAG)
    begin = tag + len(PYTHON_TAG) if tag >= 0 else 0
    rest = text[begin:]
    if tag >= 0 and not rest.lstrip().startswith("{"):
        yield tag, len(text), (_python(rest),)
        return
    at, tagged = text.find("{", begin), tag >= 0
    while at >= 0:
        end = at + 1
        try:
            value, end = _decoded(text, at)
        except ValueError as error:
            # a turn that begins as a call is one; a brace within a text is not
            if (tagged or not text[:at].strip()) and _CALL_BEGINS.match(text, at):
                wrong = f"the call is not valid JSON: {error}"
                call = ToolCall(name="", arguments=text[at:].strip(), error=wrong)
                yield (tag if tagged else at), len(text), (call,)
                return
        else:
            if isinstance(value, dict) and (tagged or ("name" in value and value.keys() & {"parameters", "arguments"})):
                behind = end + len(text[end:]) - len(text[end:].lstrip("; \n"))
                yield (tag if tagged else at), behind, (_readable(value, text[at:end]),)
                tagged, end = False, behind
        at = text.find("{", end)


def _python(code: str) -> ToolCall:
    """What stands behind the tag and is no JSON: a built-in tool, `name.call(query="...")`, or Python."""
    found = _BUILT_IN.fullmatch(code)
    if found:
        try:
            called = ast.parse(code.strip(), mode="eval").body
            keywords = called.keywords if isinstance(called, ast.Call) else []
            values = {str(word.arg): ast.literal_eval(word.value) for word in keywords}
            return ToolCall(name=found[1], arguments=json.dumps(values, ensure_ascii=False))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            return ToolCall(name=found[1], arguments=code, error=f"the call cannot be read: {error}")
    return ToolCall(name="code_interpreter", arguments=json.dumps({"code": code}, ensure_ascii=False))


def _write_llama(name: str, arguments: str) -> str:
    return f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}'


# ------------------------------------------------ mistral: [TOOL_CALLS][{...}] or [TOOL_CALLS]name[ARGS]{...}

TOOL_CALLS = "[TOOL_CALLS]"
MISTRALS_TAGS = ("[THINK]", "[/THINK]")
_NAMED = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\[{]*)?\s*(?:\[ARGS\])?\s*(?=\{|\Z|\[TOOL_CALLS\])")


def _mistral(text: str, tools: Tools) -> Spans:
    at = text.find(TOOL_CALLS)
    while at >= 0:
        begin = at + len(TOOL_CALLS)
        stop = _find(text, TOOL_CALLS, begin)
        named = _NAMED.match(text, begin)
        if named:
            call, end = _object(named[1], text, named.end(), stop)
            calls: tuple[ToolCall, ...] = (call,)
        else:
            try:
                calls, end = _written(text, begin)
            except ValueError as error:
                end, wrong = stop, f"the calls are not valid JSON: {error}"
                calls = (ToolCall(name="", arguments=text[begin:stop].strip(), error=wrong),)
        yield at, end, calls
        at = text.find(TOOL_CALLS, end)


def _write_mistral(name: str, arguments: str) -> str:
    return f'{TOOL_CALLS}[{{"name": {json.dumps(name)}, "arguments": {arguments}}}]'


# ------------------------------------------------ deepseek: <｜tool▁call▁begin｜>function<｜tool▁sep｜>name ```json ...

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"([^\n]*)\n```(?:json)?[ ]*\n?")


def _deepseek(text: str, tools: Tools) -> Spans:
    at = text.find(CALL_BEGIN)
    start = text.find(CALLS_BEGIN)
    if 0 <= start < at:  # the tag around all calls
        yield start, start + len(CALLS_BEGIN), ()
    while at >= 0:
        begin = at + len(CALL_BEGIN)
        stop = min(_find(text, mark, begin) for mark in (CALL_END, CALL_BEGIN, CALLS_END))
        sep = text.find(CALL_SEP, begin, stop)
        if sep < 0:
            wrong = "the call names no tool"
            call, end = ToolCall(name="", arguments=text[begin:stop].strip(), error=wrong), stop
        else:
            behind = sep + len(CALL_SEP)
            fenced = _FENCED.match(text, behind, stop)
            # V3 and R1 write `function`, the name and a fenced object; V3.1 writes the name and the object
            name, first = (fenced[1], fenced.end()) if fenced else (text[begin:sep], behind)
            call, end = _object(name.strip(), text, first, stop)
        closed = text.find(CALL_END, end)
        following = text.find(CALL_BEGIN, end)
        if closed >= 0 and (following < 0 or closed < following):
            end = closed + len(CALL_END)
        yield at, end, (call,)
        at = text.find(CALL_BEGIN, end)
        closing = text.find(CALLS_END, end)
        if closing >= 0 and (at < 0 or closing < at):
            yield closing, closing + len(CALLS_END), ()


def _write_deepseek(name: str, arguments: str) -> str:
    fenced = f"function{CALL_SEP}{name}\n```json\n{arguments}\n```"
    return f"{CALLS_BEGIN}{CALL_BEGIN}{fenced}{CALL_END}{CALLS_END}"


# ------------------------------------------------ harmony: <|channel|>commentary to=functions.x<|message|>{...}<|call|>

START, MESSAGE = "<|start|>", "<|message|>"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
BODY_ENDS = ("<|end|>", "<|call|>", "<|return|>")


def harmony_kind(header: str) -> Literal["call", "thought", "said"]:
    """What a message of gpt-oss with this header is."""
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    if recipient and recipient[1] not in ("assistant", "user", "all"):
        return "call"
    return "thought" if channel and channel[1] == "analysis" else "said"


def harmony_body(text: str) -> str:
    """Up to the mark that ends a message."""
    return text[: min(_find(text, mark, 0) for mark in BODY_ENDS)]


def parse_harmony(text: str, tools: Tools = (), opened: bool | None = None) -> Parsed:
    """The messages of a turn of gpt-oss: `analysis` is thought, `final` and a `commentary` to nobody is said, a message
    to a function is a call. The turn begins behind `<|start|>assistant`, which the prompt ends with."""
    if MESSAGE not in text and "<|channel|>" not in text:
        return Parsed(content=text, unread=text)
    said: list[str] = []
    unread: list[str] = []
    thought: list[str] = []
    calls: list[ToolCall] = []
    for part in text.split(START):
        header, mark, body = part.partition(MESSAGE)
        body = harmony_body(body)
        match harmony_kind(header):
            case "call":
                recipient = _RECIPIENT.search(header)
                assert recipient is not None
                calls.append(_harmony_call(recipient[1], body, mark))
                unread.append(part)
            case "thought":
                thought.append(body)
            case "said":
                said.append(body)
                unread.append(body)
    return Parsed(
        content="\n".join(filter(None, said)),
        thinking="\n".join(thought),
        calls=tuple(calls),
        unread="\n".join(filter(None, unread)),
    )


def _harmony_call(recipient: str, body: str, mark: str) -> ToolCall:
    name = recipient.removeprefix("functions.")
    if not mark:
        return ToolCall(name=name, error="the call has no message")
    if recipient == "python":  # takes code as it is
        return ToolCall(name="python", arguments=json.dumps({"code": body}, ensure_ascii=False))
    call, end = _object(name, body, 0, len(body))
    if not call.error and body[end:].strip():
        return ToolCall(name=name, arguments=body, error="the arguments are not valid JSON: more follows behind them")
    return call


def _write_harmony(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"


FORMATS: dict[str, ToolFormat] = {
    made.name: made
    for made in (
        ToolFormat(
            name="harmony",
            marks=("<|channel|>", "<|start|>", "<|message|>"),
            stop=("<|call|>",),
            parse=parse_harmony,
            write=_write_harmony,
        ),
        ToolFormat(
            name="deepseek",
            marks=(CALL_BEGIN, CALL_SEP),
            opens=(CALL_BEGIN, CALLS_BEGIN),
            parse=_parser(CALL_BEGIN, _deepseek),
            write=_write_deepseek,
        ),
        ToolFormat(
            name="mistral",
            marks=(TOOL_CALLS,),
            opens=(TOOL_CALLS,),
            thinks=MISTRALS_TAGS,
            parse=_parser(TOOL_CALLS, _mistral, MISTRALS_TAGS),
            write=_write_mistral,
        ),
        ToolFormat(
            name="qwen_xml",
            marks=(OPEN, "<function="),
            opens=("<function=", OPEN),
            parse=_parser("<function=", _qwen_xml),
            write=_write_qwen_xml,
        ),
        ToolFormat(
            name="hermes",
            marks=(OPEN,),
            opens=(OPEN,),
            without=("<arg_key>", "<function=", "<function "),
            parse=_parser(OPEN, _hermes),
            write=_write_hermes,
        ),
        ToolFormat(
            name="llama",
            marks=('"parameters"', "<|start_header_id|>"),
            opens=(PYTHON_TAG, "{"),
            stop=("<|eom_id|>",),
            parse=_parser(PYTHON_TAG, _llama),
            write=_write_llama,
        ),
    )
}
"""by name, in the order in which `detect` tries them"""
