"""A chat that ends with the assistant's words is left open as transformers leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_tokenizers import CHAT, byte_folder

from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer, prompt_text, prompt_tokens

REAL = Path(__file__).parents[2] / ".venv" / "tokenizers"
TRIMS = CHAT.replace("m['content']", "m['content'] | trim")
ENDS = ["The answer is", "  spaced  ", "x\n", "<b>", "é π", "{{ jinja }}"]
OPEN = {"continue_final_message": True}


def chats() -> list[list[dict[str, Any]]]:
    asked = {"role": "user", "content": "hi"}
    short = [[asked, {"role": "assistant", "content": end}] for end in ENDS]
    return [*short, *([*chat[:1], {"role": "assistant", "content": "a"}, *chat] for chat in short)]


def compare(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for chat in chats():
        wanted = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert prompt_text(chat, ours, arguments=OPEN) == wanted


@pytest.mark.parametrize("template", [CHAT, TRIMS])
def test_it_is_as_with_transformers(tmp_path: Path, template: str) -> None:
    compare(byte_folder(tmp_path, template=template))


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "deepseek_v3"])
def test_it_is_as_with_transformers_on_real_tokenizers(name: str) -> None:
    if not (REAL / name / "tokenizer.json").is_file():
        pytest.skip("make tokenizers")
    compare(REAL / name)


def test_parts_control_tokens_and_what_cannot_be_left_open(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_folder(tmp_path, template=CHAT))
    asked = {"role": "user", "content": "hi"}
    parts = [asked, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert prompt_text(parts, tokenizer, arguments=OPEN).endswith("assistant\na\nb")
    control = [asked, {"role": "assistant", "content": "a<|im_end|>b"}]
    tokens = prompt_tokens(control, tokenizer, arguments=OPEN)
    assert tokenizer.decode(tokens, special=True).endswith("assistant\na<|im_end|>b")
    assert tokens[-1] == tokenizer.encode("b")[0]
    assert tokenizer.encode("<|im_end|>")[0] not in tokens[-12:], "it is text"
    for chat in ([asked], [asked, {"role": "assistant", "content": ""}]):
        with pytest.raises(UserError, match="must end with a message of the assistant that says something"):
            prompt_text(chat, tokenizer, arguments=OPEN)
    bare = Tokenizer(byte_folder(tmp_path / "bare", template=None))
    assert prompt_text([asked, {"role": "assistant", "content": "So"}], bare, arguments=OPEN) == "hi\nSo"
