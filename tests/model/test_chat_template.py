"""What reaches a chat template, what is refused because it would be dropped, and dates that a run shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support_models import qwen3_folder
from support_tokenizers import CHAT, byte_folder

from async_rl.errors import UserError
from async_rl.model.folder import load_model, save_folder
from async_rl.model.tokenizer import Tokenizer, problem_text, prompt_text
from async_rl.task import Problem

TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\\n' }}{% for tool in tools %}{{ tool | tojson }}\\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for part in m.content %}{{ part.text }}"
    "{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }} {{ m.name }}){% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
CHAT_WITH_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "31 C", "name": "get_weather", "tool_call_id": "c1"},
]


def made(folder: Path, template: str | None = TOOLS, *, time: str = "") -> Tokenizer:
    return Tokenizer(byte_folder(folder, template=template), time=time)


def test_tool_calls_tools_and_arguments_are_rendered_as_transformers_renders_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = made(tmp_path)
    problem = Problem(index=0, prompt=CHAT_WITH_CALL, tools=[WEATHER], template_args={"enable_thinking": False})
    text = problem_text(problem, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert text == theirs.apply_chat_template(
        CHAT_WITH_CALL, tools=[WEATHER], enable_thinking=False, tokenize=False, add_generation_prompt=True
    )
    for shown in ('get_weather {"city": "Rome"}', "(c1 get_weather)", json.dumps(WEATHER), "<think>"):
        assert shown in text


@pytest.mark.parametrize(
    ("template", "given", "reason"),
    [
        (CHAT, {"prompt": CHAT_WITH_CALL}, "shows no tool_calls"),
        (CHAT, {"prompt": CHAT_WITH_CALL[:1], "tools": [WEATHER]}, "shows no tools"),
        (
            CHAT,
            {"prompt": CHAT_WITH_CALL[:1], "template_args": {"enable_thinking": False}},
            "no argument 'enable_think",
        ),
        (TOOLS, {"prompt": CHAT_WITH_CALL[:1], "template_args": {"messages": []}}, "takes no argument 'messages'"),
        (None, {"prompt": CHAT_WITH_CALL}, "'tool_calls' of message 2 needs"),
        (None, {"prompt": CHAT_WITH_CALL[2:]}, "'name' of message 1 needs"),
        (None, {"prompt": CHAT_WITH_CALL[:1], "tools": [WEATHER]}, "tools need"),
        (None, {"prompt": CHAT_WITH_CALL[:1], "template_args": {"x": 1}}, "its arguments need"),
        (TOOLS, {"prompt": "text", "tools": [WEATHER]}, "a prompt that is text shows no tools"),
        (TOOLS, {"prompt": "text", "template_args": {"x": 1}}, "goes through no chat template"),
        (CHAT, {"prompt": [{"role": "user", "content": None}]}, "refused the messages"),
        (CHAT, {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "no part of type 'image'"),
        (None, {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "no part of type 'image'"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(tmp_path: Path, template: str, given: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        problem_text(Problem(index=0, **given), made(tmp_path, template))


@pytest.mark.parametrize("template", [CHAT, TOOLS, None])
@pytest.mark.parametrize("nothing", [None, []])
def test_a_message_whose_tool_calls_are_empty_is_one_without(tmp_path: Path, template: str, nothing: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    empty = [{**message, "tool_calls": nothing} for message in chat]
    tokenizer = made(tmp_path, template)
    assert prompt_text(empty, tokenizer) == prompt_text(chat, tokenizer)


@pytest.mark.parametrize("template", [CHAT, TOOLS, None, "{% for m in messages %}{{ m | tojson }}{% endfor %}"])
def test_every_part_of_a_message_is_in_the_text(tmp_path: Path, template: str | None) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "1 + 1?"}]
    tokenizer = made(tmp_path, template)
    text = prompt_text([{"role": "user", "content": parts}], tokenizer)
    assert "What is" in text
    assert "1 + 1?" in text
    assert "type" not in text
    assert tokenizer.takes_parts == (template == TOOLS)


def test_a_template_that_writes_whole_messages_shows_calls_without_naming_them(tmp_path: Path) -> None:
    text = prompt_text(CHAT_WITH_CALL, made(tmp_path, "{% for m in messages %}{{ m | tojson }}{% endfor %}"))
    assert '"tool_calls"' in text
    assert '"tool_call_id"' in text


def test_a_template_named_tool_use_is_taken_when_there_are_tools(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_folder(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": TOOLS}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": named}))
    tokenizer, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for tools in ([], [WEATHER]):
        expected = theirs.apply_chat_template(
            CHAT_WITH_CALL[:1], tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.render(CHAT_WITH_CALL[:1], tools=tools) == expected


def test_named_templates_lie_in_a_folder_too_and_go_into_checkpoints(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = qwen3_folder(tmp_path / "source")
    (source / "chat_template.jinja").write_text(CHAT)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    save_folder(tmp_path / "saved", load_model(source), source=source)
    chat = CHAT_WITH_CALL[:1]
    expected = AutoTokenizer.from_pretrained(source).apply_chat_template(
        chat, tools=[WEATHER], tokenize=False, add_generation_prompt=True
    )
    assert "get_weather" in expected
    for folder in (source, tmp_path / "saved"):
        assert Tokenizer(folder).render(chat, tools=[WEATHER]) == expected


DATED = "{{ strftime_now('%d %B %Y, %H:%M:%S.%f') }}" + CHAT


def test_every_process_of_a_run_writes_the_same_date(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tokenizers = [made(tmp_path, DATED, time="2026-11-28T23:59:59") for _ in range(2)]
    texts = {tokenizer.render(chat) for tokenizer in tokenizers for _ in range(2)}
    assert len(texts) == 1
    assert texts.pop().startswith("28 November 2026, 23:59:59")
    now = made(tmp_path, DATED)
    assert now.render(chat) == now.render(chat), "one tokenizer has one time"
    assert (now.dated, made(tmp_path, CHAT).dated) == (True, False)


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(tmp_path: Path, drawn: str) -> None:
    with pytest.raises(UserError, match="differs from process to process"):
        made(tmp_path, drawn).render([{"role": "user", "content": "hi"}])
