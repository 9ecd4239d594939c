"""What a turn that is still being sampled has said for certain: what no continuation of it takes back."""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.task.tool_formats import (
    BODY_ENDS,
    FORMATS,
    MESSAGE,
    START,
    Parsed,
    harmony_body,
    harmony_kind,
)


def settled(text: str, marks: Sequence[str]) -> str:
    """`text` up to the first of `marks`, or to what may become one of them when more follows.

    Example: `settled("4 <too", ("<tool_call>",)) == "4 "`.
    """
    ends = [at for mark in marks if (at := text.find(mark)) >= 0]
    if ends:
        return text[: min(ends)]
    longest = max(map(len, marks), default=0)
    for begin in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[begin:]) for mark in marks):
            return text[:begin]
    return text


def said_so_far(name: str, text: str, *, calls: bool, opened: bool) -> Parsed:
    """Content and thoughts with which those of the whole turn begin, whatever follows.

    Args:
        name: of the model's tool format; empty: it has none.
        text: of the turn so far.
        calls: calls are read out of the turn.
        opened: the prompt ended with the opening tag of a thought.
    """
    if not name:
        return Parsed(content=text)
    if name == "harmony":
        return _harmony(text)
    opens, (begin, end) = FORMATS[name].opens, FORMATS[name].thinks
    thinking, rest = "", text
    body = text.lstrip()
    if begin.startswith(body):  # it may become the tag
        return Parsed(content="")
    if opened or body.startswith(begin):
        body = body.removeprefix(begin)
        thought, closed, rest = body.partition(end)
        if not closed:
            return Parsed(content="", thinking=settled(body, (end, opens[0])).strip("\n"))
        thinking, rest = thought.strip("\n"), rest.lstrip("\n")
    if not calls:
        return Parsed(content=rest, thinking=thinking)
    # with a call in it the text loses the white space at its ends
    content = "" if rest[:1].isspace() else settled(rest, opens).rstrip()
    return Parsed(content=content, thinking=thinking)


def _harmony(text: str) -> Parsed:
    said: list[str] = []
    thought: list[str] = []
    *done, last = text.split(START)
    for number, part in enumerate([*done, last]):
        header, mark, body = part.partition(MESSAGE)
        kind = harmony_kind(header)
        if not mark or kind == "call":
            break
        body = harmony_body(body) if number < len(done) else settled(body, (START, *BODY_ENDS))
        (thought if kind == "thought" else said).append(body)
    return Parsed(content="\n".join(filter(None, said)), thinking="\n".join(thought))
