"""The tokenizer against transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_models import ALPHABET, qwen3_folder
from support_tokenizers import byte_folder

from async_rl.errors import UserError
from async_rl.model.create import write_character_tokenizer
from async_rl.model.data_text import Disguise
from async_rl.model.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{%- if add_generation_prompt %}\n<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(alphabet=ALPHABET, max_size=40))
def test_every_text_of_the_alphabet_survives_the_way_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_ids_are_those_of_transformers(folder: Path, tokenizer: Tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = "a1 + b\n2 <|end|>"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode(tokenizer.encode("a1 + b\n2 ")) == "a1 + b\n2 "


@pytest.mark.parametrize("text", ["1A2", "é", "a\tb"])
def test_an_unknown_character_is_named_not_dropped(tokenizer: Tokenizer, text):
    unknown = next(c for c in text if c not in ALPHABET)
    with pytest.raises(ValueError, match=repr(unknown).replace("\\", "\\\\")):
        tokenizer.encode(text)


def test_special_tokens_are_left_out_of_text_unless_asked_for(tokenizer: Tokenizer):
    ids = [1, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "1"
    assert tokenizer.decode(ids, special=True) == "1<|end|>"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path: Path, place):
    from transformers import AutoTokenizer

    write_character_tokenizer(tmp_path, ALPHABET)
    assert not Tokenizer(tmp_path).has_chat_template
    if place.endswith(".json"):
        values = json.loads((tmp_path / place).read_text()) | {"chat_template": TEMPLATE}
        (tmp_path / place).write_text(json.dumps(values))
    else:
        (tmp_path / place).write_text(TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "1+1?"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render(messages, add_generation_prompt=prompt) == expected
    with pytest.raises(UserError, match="unknown role tool"):
        tokenizer.render([{"role": "tool", "content": ""}])


def test_a_template_cannot_reach_python(tmp_path: Path):
    write_character_tokenizer(tmp_path, "ab")
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(UserError, match="refused"):
        Tokenizer(tmp_path).render([{"role": "user", "content": ""}])


def test_without_a_template_rendering_is_refused(tokenizer: Tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_end_of_text_is_found_in_the_model_files_when_the_tokenizer_names_none(tmp_path: Path):
    write_character_tokenizer(tmp_path, "ab")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer(tmp_path).eos_id == 1
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_an_alphabet_needs_each_character_once(tmp_path: Path, alphabet):
    with pytest.raises(ValueError, match="each character once"):
        write_character_tokenizer(tmp_path, alphabet)


STORED = [
    {"truncation": {"direction": "Right", "max_length": 24, "strategy": "LongestFirst", "stride": 0}},
    {"truncation": {"direction": "Left", "max_length": 5, "strategy": "OnlyFirst", "stride": 2}},
    {
        "padding": {
            "strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "0",
        }
    },
    {
        "padding": {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "0",
        }
    },
]  # fmt: skip


@pytest.mark.parametrize("stored", [*STORED, STORED[0] | STORED[2]])
@pytest.mark.parametrize("text", ["1", "1+1=2 and so on, until the text is longer than any limit"])
def test_truncation_and_padding_stored_in_the_file_change_nothing(tmp_path: Path, stored, text):
    from transformers import AutoTokenizer

    plain = Tokenizer(byte_folder(tmp_path / "plain")).encode(text)
    file = byte_folder(tmp_path / "stored") / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    assert Tokenizer(file.parent).encode(text) == plain
    assert AutoTokenizer.from_pretrained(file.parent)(text, add_special_tokens=False)["input_ids"] == plain


def test_dropout_stored_in_the_file_changes_nothing(tmp_path: Path):
    file = byte_folder(tmp_path, merges=[("a", "b"), ("ab", "c")]) / "tokenizer.json"
    plain = Tokenizer(tmp_path).encode("abcabc")
    assert len(plain) == 2
    values = json.loads(file.read_text())
    values["model"]["dropout"] = 0.9
    file.write_text(json.dumps(values))
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.encode("abcabc") for _ in range(8)] == [plain] * 8
    nothing = Disguise(tokenizer.control_pattern, [])
    assert [tokenizer.encode_disguised("abcabc", nothing) for _ in range(8)] == [plain] * 8
