"""Tokenizers that need no file from anywhere: one token a character of an alphabet, or one a byte.

Both end with `<|end|>` (end of text) and `<|pad|>`, and transformers' AutoTokenizer loads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

END, PAD = "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_character_tokenizer(folder: str | Path, alphabet: str) -> int:
    """Write tokenizer.json and tokenizer_config.json with one token per character of `alphabet`, in its order.

    Returns the number of tokens. Raises ValueError for an empty alphabet or a character twice.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet must hold each character once, it is {alphabet!r}")
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=""))
    # Every character its own piece, newlines included.
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return _write(made, Path(folder))


def write_byte_tokenizer(folder: str | Path) -> int:
    """Write tokenizer.json and tokenizer_config.json with one token a byte of UTF-8, and a plain chat template.

    Returns the number of tokens, 258.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
    made = tokenizers.Tokenizer(tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return _write(made, Path(folder), chat_template=CHAT_TEMPLATE)


def _write(made: tokenizers.Tokenizer, folder: Path, **settings: str) -> int:
    """Add the two special tokens and write both files; the number of tokens."""
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in (END, PAD)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
    return made.get_vocab_size()
