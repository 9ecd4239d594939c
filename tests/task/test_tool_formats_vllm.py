"""Tool calls as vLLM's parsers read them, and gpt-oss's as OpenAI's own package does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_tools import ARGUMENTS, NAMES, described, several

from async_rl.task.tool_formats import FORMATS

pytestmark = pytest.mark.xdist_group("vllm")
FOLDER = Path(__file__).parents[2] / ".venv" / "tokenizers"
THEIRS = {
    "hermes": "hermes", "llama": "llama3_json", "mistral": "mistral", "deepseek": "deepseek_v3",
    "qwen_xml": "qwen3_coder",
}  # fmt: skip
MARKS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
]  # fmt: skip
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3, unique_by=lambda call: call[0])
CONTENT = st.sampled_from(["", "Let me look it up.", "so: 1 < 2"])


class Vocabulary:
    """As much of a tokenizer as their parsers look at: a token for each mark."""

    is_fast = True

    def get_vocab(self) -> dict[str, int]:
        return {mark: i for i, mark in enumerate(MARKS)}

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.get_vocab()[text]] if text in MARKS else []

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(MARKS[i] for i in ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.get_vocab().get(token)


@pytest.fixture(scope="module")
def vllm_parser() -> Callable[[str, list[dict[str, Any]]], Any]:
    """(name of their parser, tools) -> function from a text to what they found"""
    pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    def make(name: str, tools: list[dict[str, Any]]) -> Any:
        request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}], tools=tools)
        parser = ToolParserManager.get_tool_parser(name)(Vocabulary(), request.tools)
        return lambda text: parser.extract_tool_calls(text, request)

    return make


@pytest.mark.parametrize("name", THEIRS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(content=CONTENT, calls=CALLS)
def test_calls_are_those_that_vllm_reads(vllm_parser, name, content, calls) -> None:
    if name == "qwen_xml" and ("<" in json.dumps(calls) or "null" in json.dumps(calls)):
        return  # values there are text between tags
    tools = [described(*call) for call in calls]
    text = content + several(name, calls, "\n")
    theirs = vllm_parser(THEIRS[name], tools)(text)
    ours = FORMATS[name].parse(text, tools)
    assert theirs.tools_called
    found = [(call.function.name, json.loads(call.function.arguments)) for call in theirs.tool_calls]
    assert [(call.name, call.values()) for call in ours.calls] == found == calls
    if name != "llama":  # theirs drops what stands before a call
        assert ours.content == (theirs.content or "").strip()


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OpenAI's encoding, with the vocabulary of the tokenizer that `make tokenizers` fetches."""
    package = pytest.importorskip("openai_harmony", reason="openai-harmony is not installed (make vllm)")
    file = FOLDER / "gptoss" / "tokenizer.json"
    if not file.is_file():
        pytest.skip("the tokenizer of gptoss is not there (make tokenizers)")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary = json.loads(file.read_text())["model"]["vocab"]
    words = sorted((i, bytes(map(byte_of.__getitem__, word))) for word, i in vocabulary.items() if i < 199_998)
    folder = tmp_path_factory.mktemp("tiktoken")
    lines = (base64.b64encode(word) + b" %d\n" % i for i, word in words)
    (folder / "o200k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return package.load_harmony_encoding(package.HarmonyEncodingName.HARMONY_GPT_OSS)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1, max_size=12)
PIECES = st.one_of(
    st.tuples(st.just("analysis"), TEXTS),
    st.tuples(st.just("commentary"), TEXTS),
    st.tuples(st.just("call"), st.tuples(NAMES, ARGUMENTS, st.sampled_from(["role", "channel"]))),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECES, max_size=3), final=st.none() | TEXTS)
def test_messages_of_gpt_oss_are_those_that_openai_reads(harmony, pieces, final) -> None:
    from openai_harmony import Role

    said = []
    for kind, what in pieces:
        if kind == "call":
            name, arguments, where = what
            header = f" to=functions.{name}<|channel|>commentary <|constrain|>json"
            if where == "channel":
                header = f"<|channel|>commentary to=functions.{name} <|constrain|>json"
            said.append(f"{header}<|message|>{json.dumps(arguments)}<|call|>")
        else:
            said.append(f"<|channel|>{kind}<|message|>{what}<|end|>")
    if final is not None:
        said.append(f"<|channel|>final<|message|>{final}<|return|>")
    if not said:
        return
    text = "<|start|>assistant".join(said)
    messages = harmony.parse_messages_from_completion_tokens(
        harmony.encode(text, allowed_special="all"), Role.ASSISTANT
    )
    spoken = [(m.recipient, m.channel, "".join(part.text for part in m.content)) for m in messages]
    parsed = FORMATS["harmony"].parse(text, ())
    calls = [(to.removeprefix("functions."), json.loads(body)) for to, _, body in spoken if to]
    assert [(call.name, call.values()) for call in parsed.calls] == calls
    thoughts = [body for to, channel, body in spoken if not to and channel == "analysis"]
    assert parsed.thinking == "\n".join(thoughts)
    assert parsed.content == "\n".join(body for to, channel, body in spoken if not to and channel != "analysis")
