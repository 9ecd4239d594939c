"""What is told of a turn before it is complete is never taken back: every prefix of turns in every format."""

from __future__ import annotations

import json
from random import Random

import pytest

from async_rl.task.tool_formats import FORMATS, Parsed
from async_rl.task.unfinished_turn import said_so_far, settled

PIECES = [
    "a", " ", "\n", "Let me see. ", "{", "\"name\"", "}", "{\"a\": [1, 2]}", "<think>",
    "[THINK]", "[/THINK]", "[/TH", "</think>", "<", "</",
    "<thi", "\n\n", "<tool_call>", "</tool_call>", "<function=f>", "<parameter=a>\n1\n</parameter>",
    "</function>", "<|python_tag|>", "[TOOL_CALLS]", "[TOOL_", "[ARGS]", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>", "<|channel|>",
    "analysis", "final", "commentary", " to=functions.f", " to=user", "<|message|>", "<|end|>", "<|start|>",
    "assistant", "<|call|>", "<|en", "é", "f",
]  # fmt: skip


def shown(parsed: Parsed, *, calls: bool) -> tuple[str, str]:
    """(content, thoughts) as the endpoint sends them: calls that nobody asked for, or that cannot be read, are text."""
    read = not parsed.calls or (calls and not any(call.error for call in parsed.calls))
    return (parsed.content if read else parsed.unread), parsed.thinking


def turns(name: str, random: Random) -> list[str]:
    """Random turns, and ones that are in order but for one piece."""
    written = FORMATS[name].write("f", json.dumps({"a": "x", "b": {"c": None}}))
    whole = [
        f"<think>\nhm < {{\n</think>\n\nGo. {written}\n",
        f"hm\n</think>\n\nGo. {written}",
        f"[THINK]hm < {{[/THINK]Go. {written}\n",
        f"Go. {written} and {written} done",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It.<|return|>" + written,
    ]
    found = list(whole)
    for text in whole * 40:
        at = random.randrange(len(text) + 1)
        found.append(text[:at] + random.choice(PIECES) + text[at + random.choice([0, 0, 3]) :])
    return found + ["".join(random.choices(PIECES, k=random.randrange(1, 9))) for _ in range(300)]


@pytest.mark.parametrize("name", [*FORMATS, ""])
def test_what_was_told_of_a_turn_is_never_taken_back(name: str) -> None:
    random, told = Random(5), 0
    for text in turns(name or "hermes", random):
        for calls in (False, True):
            for opened in (False, True):
                parsed = FORMATS[name].parse(text, (), opened) if name else Parsed(content=text)
                content, thinking = shown(parsed, calls=calls)
                before = Parsed(content="")
                for end in range(len(text) + 1):
                    now = said_so_far(name, text[:end], calls=calls, opened=opened)
                    assert now.content.startswith(before.content), (text, end)
                    assert now.thinking.startswith(before.thinking), (text, end)
                    before = now
                assert content.startswith(before.content), (text, calls, opened)
                assert thinking.startswith(before.thinking), (text, calls, opened)
                told += len(before.content) + len(before.thinking)
    assert told > 3_000, "it is told at all"


def test_thoughts_and_the_text_before_a_call_are_told_as_they_come() -> None:
    text = "<think>\nIs it 4?\n</think>\n\nLet me see.\n<tool_call>\n{"
    ends = [text.index("?") + 1, text.index("see") + 3, len(text)]
    found = [said_so_far("hermes", text[:end], calls=True, opened=False) for end in ends]
    assert [(p.thinking, p.content) for p in found] == [
        ("Is it 4?", ""),
        ("Is it 4?", "Let me see"),
        ("Is it 4?", "Let me see."),
    ]
    opened = said_so_far("hermes", "Is it", calls=False, opened=True)
    assert (opened.thinking, opened.content) == ("Is it", "")


def test_a_stop_string_is_held_back_from_its_first_letter_on() -> None:
    marks = ("\nUser:", "END")
    assert [settled(text, marks) for text in ("abc", "abc\n", "abc\nUse", "abc\nUsed", "abcE", "abEND c", "")] == [
        "abc", "abc", "abc", "abc\nUsed", "abc", "ab", "",
    ]  # fmt: skip
    assert settled("abc", ()) == "abc"
