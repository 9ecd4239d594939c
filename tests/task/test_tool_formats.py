"""Tool calls in the formats of models: what is written is read, wherever it stands, and what is malformed is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_tools import ARGUMENTS, NAMES, described, several

from async_rl.task.tool_formats import FORMATS, Parsed, call_id, detect

TEMPLATES = Path(__file__).parents[2] / ".venv" / "chat_templates"
JSON_FORMATS = [name for name in FORMATS if name != "qwen_xml"]
CONTENT = st.sampled_from(["", "Let me look it up.", "I think\n\nso: 1 < 2", "{braces} and [brackets]"])
BETWEEN = st.sampled_from(["", "\n", " \n\n"])


def read(parsed: Parsed) -> list[tuple[str, dict[str, Any]]]:
    assert not any(call.error for call in parsed.calls), parsed
    return [(call.name, call.values()) for call in parsed.calls]


@pytest.mark.parametrize("name", JSON_FORMATS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(content=CONTENT, calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), between=BETWEEN)
def test_calls_are_read_as_they_were_written(name, content, calls, between) -> None:
    if name == "harmony":
        text = f"<|channel|>analysis<|message|>{content}<|end|><|start|>assistant" if content else ""
        parsed = FORMATS[name].parse(text + several(name, calls, between), ())
        assert (parsed.thinking, parsed.content) == (content, "")
    else:
        if name == "llama" and "{" in content:
            content = ""  # a brace begins a call there
        parsed = FORMATS[name].parse(content + several(name, calls, between), ())
        assert parsed.content == content.strip()
    assert read(parsed) == calls


@settings(max_examples=80, deadline=None, derandomize=True)
@given(content=CONTENT, calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3, unique_by=lambda c: c[0]))
def test_values_between_tags_have_the_types_that_the_tool_describes(content, calls) -> None:
    tools = [described(*call) for call in calls]
    text = content + "".join(FORMATS["qwen_xml"].write(tool, json.dumps(arguments)) for tool, arguments in calls)
    if "</parameter>" in text.replace("\n</parameter>\n", "") or "<parameter=" in json.dumps(calls):
        return
    parsed = FORMATS["qwen_xml"].parse(text, tools)
    assert (parsed.content, read(parsed)) == (content.strip(), calls)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=30), cut=st.integers(0, 200), at=st.integers(0, 200))
def test_any_text_is_parsed_without_an_exception(name, text, cut, at) -> None:
    written = several(name, [("f", {"a": "x"}), ("g", {"b": [1, {"c": None}]})], "\n")
    for said in (text, written[:cut], written[cut:], written[:at] + text + written[at:]):
        for call in FORMATS[name].parse(said, ()).calls:
            assert call.name or call.error
            assert call.error or isinstance(json.loads(call.arguments), dict)
            assert not call.error or call.values() == {}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["", "42", "the answer is {42}", '{"a": 1}', "f(x) = {x | x > 1}", "<b>bold</b>\n"])
def test_an_answer_is_no_call(name: str, text: str) -> None:
    parsed = FORMATS[name].parse(text, ())
    assert (parsed.content, parsed.calls) == (text, ())


BROKEN = '{"a": 1,,}'
MALFORMED = {
    "hermes": [
        f'<tool_call>\n{{"name": "f", "arguments": {BROKEN}}}\n</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "<tool_call>f(1)</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}} and so on</tool_call>',
        "<tool_call></tool_call>",
        '<tool_call>{"name": "f", "arguments": "{1}"}</tool_call>',
    ],
    "qwen_xml": ["<tool_call>\n<function=>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"],
    "llama": [
        f'{{"name": "f", "parameters": {BROKEN}}}',
        '<|python_tag|>{"name": "f", "parameters"',
        '{"name": 3, "parameters": {}}',
        "<|python_tag|>search.call(query=x + y)",
    ],
    "mistral": [
        f'[TOOL_CALLS][{{"name": "f", "arguments": {BROKEN}}}]',
        f"[TOOL_CALLS]f[ARGS]{BROKEN}",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][3]",
    ],
    "deepseek": [
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{BROKEN}\n```<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>f{}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>[1]<｜tool▁call▁end｜>",
    ],
    "harmony": [
        f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{BROKEN}<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json",
        '<|channel|>commentary to=functions.f<|message|>{"a": 1} {}<|call|>',
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_a_malformed_call_is_a_call_with_the_reason(name: str, text: str) -> None:
    (call,) = FORMATS[name].parse(text, ()).calls
    assert call.error
    assert call.values() == {}
    said = FORMATS[name].parse(text, ()).message()
    assert said["tool_calls"][0]["id"] == call_id(0)


@pytest.mark.parametrize(
    ("name", "text", "content", "thinking", "calls"),
    [
        ("hermes", "<think>\nI may write <tool_call> here\n</think>\n\n42", "42", "I may write <tool_call> here", []),
        ("hermes", "so I add\n</think>\n\n42", "42", "so I add", []),
        ("hermes", '<think>go <tool_call>{"name": "f"}</tool_call>', "", "go ", [("f", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>', "", "",
         [("f", {"a": "</think>"})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>x', "x", "",
         [("f", {"a": "</tool_call>"})]),
        ("hermes", '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', "", "", [("f", {}), ("g", {})]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [("f", {"a": 1})]),
        ("qwen_xml", "<function=f>\n<parameter=a>\n1\n2\n</parameter>\n</function>", "", "", [("f", {"a": "1\n2"})]),
        ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', "", "", [("f", {"a": 1})]),
        ("llama", '<|python_tag|>brave_search.call(query="rain")', "", "", [("brave_search", {"query": "rain"})]),
        ("llama", "<|python_tag|>print(1)", "", "", [("code_interpreter", {"code": "print(1)"})]),
        ("llama", '{"result": {"name": "f", "parameters": {}}}', '{"result": {"name": "f", "parameters": {}}}', "", []),
        ("mistral", "Well.[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{\"a\": 1}", "Well.", "",
         [("f", {}), ("g", {"a": 1})]),
        ("mistral", "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}]", "", "", [("f", {})]),
        ("mistral", '[TOOL_CALLS]f{"a": "[TOOL_CALLS]"} thanks', "thanks", "", [("f", {"a": "[TOOL_CALLS]"})]),
        ("deepseek", "I see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜>"
         "<｜tool▁calls▁end｜>", "I see.", "", [("f", {"a": 1})]),
        ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>42", "42",
         "hm", []),
        ("harmony", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.f<|channel|>"
         "commentary json<|message|>{}", "I look.", "", [("f", {})]),
        ("harmony", "<|channel|>analysis to=python code<|message|>print(1)<|call|>", "", "",
         [("python", {"code": "print(1)"})]),
    ],
)  # fmt: skip
def test_what_models_write(name, text, content, thinking, calls) -> None:
    parsed = FORMATS[name].parse(text, ())
    assert (parsed.content, parsed.thinking, read(parsed)) == (content, thinking, calls)


KNOWN = {
    "qwen3": "hermes", "qwen2_5": "hermes", "qwen3_vl": "hermes", "qwen3_instruct_2507": "hermes",
    "qwen3_6": "qwen_xml", "qwen3_5_think": "qwen_xml", "nemotron_3_nano": "qwen_xml",
    "llama3_1": "llama", "llama3_2": "llama", "deepseekv3": "deepseek", "deepseek_r1_distill": "deepseek",
    "gptoss": "harmony",
    # formats of their own, or none
    "glm4moe": "", "gemma3": "", "gemma4": "", "llama3": "", "phi3": "", "lfm2": "", "cohere2": "", "smolvlm": "",
}  # fmt: skip


@pytest.mark.parametrize("template", KNOWN)
def test_the_format_of_a_real_chat_template_is_found(template: str) -> None:
    file = TEMPLATES / f"{template}.jinja"
    if not file.is_file():
        pytest.skip("the chat templates are not there (make tokenizers)")
    assert detect(file.read_text()) == KNOWN[template]


def test_of_templates_without_tools_nothing_is_detected() -> None:
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert detect("") == detect(chatml) == ""
