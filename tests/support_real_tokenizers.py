"""Tokenizers and chat templates of real models, ours and transformers', each loaded once a process.

`make tokenizers` fetches them into .venv.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from async_rl.model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1] / ".venv"
NAMES = ("qwen3", "llama3_1", "gemma3", "llama2", "deepseek_v3", "gptoss", "smollm2")
TEMPLATES = {"gptoss": "gptoss", "llama3_1": "llama3_1"}
"""chat templates of models whose tokenizer was packed without theirs, or with a shortened one"""
ENDS = {"gptoss": [200002, 199999, 200012], "llama3_1": [128001, 128008, 128009], "qwen3": [151645, 151643]}
"""end tokens in the models' generation_config.json"""
MORE = int(os.environ.get("ASYNC_RL_CONVERSATIONS", "0"))
"""conversations for each tokenizer; 0: as many as an ordinary test run has time for"""


@cache
def folder_of(name: str, template: str = "") -> Path:
    """A model folder with the tokenizer `name` and a chat template (empty: its own). Skips the test where it is not
    there."""
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    files = ROOT / "tokenizers" / name
    if not (files / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of {name} is not there (make tokenizers)")
    for file in files.iterdir():
        (folder / file.name).symlink_to(file)
    if template:
        source = ROOT / "chat_templates" / f"{template}.jinja"
        if not source.is_file():
            pytest.skip("the chat templates are not there (make tokenizers)")
        shutil.copy(source, folder / "chat_template.jinja")
    if name in ENDS:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS[name]}))
    return folder


@cache
def ours(name: str, template: str = "", control_tokens: Any = "escape") -> Tokenizer:
    """Our tokenizer of a model."""
    return Tokenizer(folder_of(name, template), control_tokens=control_tokens)


@cache
def theirs(name: str) -> Any:
    """transformers' tokenizer of a model, with the template of `TEMPLATES` or its own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The class that transformers takes for Llama 2, and for DeepSeek where there is no config.json with the model's
    # type, does not use the file as it is: it drops a space in front of a text, or takes DeepSeek's bytes for
    # sentencepiece.
    kind = PreTrainedTokenizerFast if name in ("llama2", "deepseek_v3") else AutoTokenizer
    return kind.from_pretrained(folder_of(name, TEMPLATES.get(name, "")))
