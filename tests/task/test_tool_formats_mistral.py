"""Turns with tool calls as Mistral's own package writes them for each version of its tokenizers, read by our parser."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from async_rl.task.tool_formats import FORMATS, call_id

pytest.importorskip("mistral_common", reason="mistral-common is not installed (pip install mistral-common)")

VERSIONS = ("v2", "v3", "v7", "v11", "v13", "v15")
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"city": "Zürich"},
    {"n": [1, {"a": 'a "quoted" word'}], "text": "so: {1 < 2}\n[TOOL_CALL] "},
    {"deep": {"a": None, "b": True}},
]
NAMES = ("get_weather", "f", "search.web", "look-up")


@cache
def instruct(version: str) -> Any:
    """Mistral's tokenizer of a version, on the vocabulary that the package brings."""
    import mistral_common
    from mistral_common.tokens.tokenizers import instruct as classes
    from mistral_common.tokens.tokenizers.base import SpecialTokens, TokenizerVersion
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    given = json.loads(file.read_text())
    special = [{"rank": i, "token_str": token.value, "is_control": True} for i, token in enumerate(SpecialTokens)]
    chosen = given["config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = Tekkenizer(
            given["vocab"], special, chosen["pattern"], chosen["default_vocab_size"],
            chosen["default_num_special_tokens"], TokenizerVersion(version),
        )  # fmt: skip
        return getattr(classes, f"InstructTokenizer{version.upper()}")(tokenizer)


def written(version: str, content: Any, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """A turn of the assistant, without the end token."""
    from mistral_common.protocol.instruct.messages import AssistantMessage
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    made = instruct(version)
    named = [
        ToolCall(id=call_id(i), function=FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False)))
        for i, (name, arguments) in enumerate(calls)
    ]
    message = AssistantMessage(content=content or None, tool_calls=named or None)
    tokens = made.encode_assistant_message(message, False)
    text = made.tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    return str(text).removesuffix("</s>")


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_are_read_as_mistral_writes_them(version: str) -> None:
    random = Random(7)
    for _ in range(40):
        calls = [(random.choice(NAMES), random.choice(ARGUMENTS)) for _ in range(random.randrange(1, 4))]
        content = random.choice(["", "Let me look."]) if version not in ("v2", "v3") else ""
        text = written(version, content, calls)
        parsed = FORMATS["mistral"].parse(text)
        assert [(call.name, call.values(), call.error) for call in parsed.calls] == [(*call, "") for call in calls], (
            text
        )
        assert parsed.content == content, text


@pytest.mark.parametrize("version", VERSIONS)
def test_words_alone_are_no_call(version: str) -> None:
    parsed = FORMATS["mistral"].parse(written(version, "It is [4].", []))
    assert (parsed.content.strip(), parsed.calls) == ("It is [4].", ())


@pytest.mark.parametrize("version", ["v13", "v15"])
def test_thoughts_are_kept_apart(version: str) -> None:
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk

    chunks = [ThinkChunk(thinking="Is it 4?\nYes."), TextChunk(text="It is 4.")]
    parsed = FORMATS["mistral"].parse(written(version, chunks, []))
    assert (parsed.thinking, parsed.content, parsed.calls) == ("Is it 4?\nYes.", "It is 4.", ())
