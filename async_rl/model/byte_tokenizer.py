"""A tokenizer of bytes: it reads and writes any text, and needs no file from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from async_rl.model.tokenizer import END, PAD

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_byte_tokenizer(folder: str | Path) -> int:
    """Write tokenizer.json and tokenizer_config.json with one token a byte of UTF-8, then `<|end|>` (end of text)
    and `<|pad|>`, and a plain chat template. Loadable with transformers' AutoTokenizer.

    Returns the number of tokens, 258.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
    made = tokenizers.Tokenizer(tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in (END, PAD)])
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    made.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return len(alphabet) + 2
