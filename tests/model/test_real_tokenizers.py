"""Tokenizers of real models, token by token and template by template against plain transformers.

`make tokenizers` fetches them into .venv/tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_rl.generator.engine import SamplingParams
from async_rl.generator.sampling import StopRules
from async_rl.model.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / ".venv" / "tokenizers"
NAMES = ("qwen3", "llama3_1", "gemma3", "llama2")
MARKS = {
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>\n", "\n</think>\n\n", "<tool_call>", "</tool_call>"],
    "llama3_1": ["<|eot_id|>", "<|python_tag|>", "<|start_header_id|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>", "<eos>"],
    "llama2": ["</s>", "<s>", "[INST]"],
}
PIECES = [
    " ", "  ", "\n", "\n\n", "\t", "the", " the", "The", ".", "...", ",", "é", "終わり", "\U0001f600",
    "\U0001f468\u200d\U0001f469", "\u00a0", "12345", "3.14", "</tool>", ">\n", '{"a": [1, 2]}', "'s", "don't",
    "\\frac{1}{2}", "x_1", "Ω", "ﬁ", "\u0301", "\r\n",
]  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city <now>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
CHECKED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pytestmark = pytest.mark.xdist_group("real tokenizers")


class Both:
    """Ours and that of transformers."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self.name = name
        self.ours = Tokenizer(FOLDER / name)
        # transformers' own class for Llama 2 does not use the file's normaliser: it drops a space in front of a text,
        # which the model's sentencepiece keeps.
        kind = PreTrainedTokenizerFast if name == "llama2" else AutoTokenizer
        self.theirs = kind.from_pretrained(FOLDER / name)
        self.rules = StopRules(self.ours, self.ours.vocab_size)

    def encoded(self, text: str) -> list[int]:
        ids: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        return ids

    def end_of(self, ids: list[int], *stop: str) -> int | None:
        """Number of tokens after which the embedded engine ends a turn of `ids`."""
        rule = np.array([self.rules.number(SamplingParams(max_tokens=1, stop_strings=stop), set)])
        for end in range(1, len(ids) + 1):
            so_far = np.array(ids[:end], dtype=np.int32)
            if self.rules.ended(rule, so_far[-1:].astype(np.int64), np.array([0]), lambda _, t=so_far: t)[0]:
                return end
        return None


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest) -> Both:
    if not (FOLDER / request.param / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {request.param} is not there (make tokenizers)")
    return Both(request.param)


def texts(name: str) -> st.SearchStrategy[str]:
    free = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.lists(st.sampled_from([*PIECES, *MARKS[name]]) | free, max_size=14).map("".join)


@CHECKED
@given(data=st.data())
def test_tokens_and_text_are_those_of_transformers(both: Both, data: st.DataObject) -> None:
    text = data.draw(texts(both.name))
    ids = both.ours.encode(text)
    assert ids == both.encoded(text)
    assert both.ours.decode(ids, special=True) == both.theirs.decode(ids, skip_special_tokens=False)
    drawn = data.draw(st.lists(st.integers(0, both.ours.vocab_size - 1), max_size=12))
    assert both.ours.decode(drawn, special=True) == both.theirs.decode(drawn, skip_special_tokens=False)


def outcome(render: Any) -> str:
    """The text, or that there is none: both refuse the same conversations."""
    try:
        return str(render())
    except Exception:  # theirs are of jinja2
        return "refused"


@CHECKED
@given(data=st.data())
def test_conversations_are_rendered_as_transformers_renders_them(both: Both, data: st.DataObject) -> None:
    if not both.ours.has_chat_template:
        pytest.skip(f"{both.name} has no chat template")
    said = texts(both.name)
    chat: list[dict[str, Any]] = [{"role": "system", "content": data.draw(said)}] if data.draw(st.booleans()) else []
    tools = [WEATHER] if data.draw(st.booleans()) and both.name != "gemma3" else []
    for _ in range(data.draw(st.integers(1, 4))):
        chat.append({"role": "user", "content": data.draw(said)})
        if tools and data.draw(st.booleans()):
            chat.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            chat.append({"role": "tool", "content": data.draw(said), "name": "get_weather", "tool_call_id": "c1"})
        chat.append({"role": "assistant", "content": data.draw(said)})
    chat = chat[: len(chat) - data.draw(st.integers(0, 1))]
    given = {"enable_thinking": data.draw(st.booleans())} if both.ours.shows("enable_thinking") else {}
    prompt = data.draw(st.booleans())
    theirs = outcome(
        lambda: both.theirs.apply_chat_template(
            chat, tools=tools or None, tokenize=False, add_generation_prompt=prompt, **given
        )
    )
    assert outcome(lambda: both.ours.render(chat, tools=tools, arguments=given, add_generation_prompt=prompt)) == theirs
    assert theirs != "refused"


@CHECKED
@given(data=st.data())
def test_a_turn_stops_at_the_first_token_whose_text_holds_a_stop_string(both: Both, data: st.DataObject) -> None:
    text = data.draw(texts(both.name))
    drawn = data.draw(st.lists(st.integers(0, both.ours.vocab_size - 1), max_size=4))
    ids = [i for i in [*both.ours.encode(text), *drawn] if i not in both.ours.end_ids]
    stops = ["</tool>", "\n", ">", " the", "わり", ". ", "é", "</tool_call>", "\n\n", "'s"]
    stop = data.draw(st.lists(st.sampled_from(stops), min_size=1, max_size=3, unique=True))
    prefixes = (n for n in range(1, len(ids) + 1) if any(s in both.ours.decode(ids[:n], behind=True) for s in stop))
    end = both.end_of(ids, *stop)
    assert end == next(prefixes, None)
    read = both.ours.turn_text(ids[:end], stop)
    assert any(read.endswith(s) for s in stop) or end is None


def test_end_tokens(both: Both) -> None:
    assert both.ours.eos_id == both.theirs.eos_token_id
    assert both.end_of([*both.ours.encode("so it is"), both.ours.eos_id]) is not None
