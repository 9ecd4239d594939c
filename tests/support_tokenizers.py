"""Small tokenizers of the kinds that real models have: bytes with special tokens and merges, Metaspace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_folder(
    folder: Path,
    *,
    specials: Sequence[str] = (ENDOFTEXT, IM_START, IM_END),
    merges: Sequence[tuple[str, str]] = (),
    eos: Any = IM_END,
    template: str | None = CHAT,
    config: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> Path:
    """A folder with a byte-level tokenizer: a token a byte (0..255), one for each merge (of the letters by which
    byte-level vocabularies spell bytes), then the special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    made.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def metaspace_folder(folder: Path, words: Sequence[str]) -> Path:
    """A folder with a tokenizer of Llama 2's kind: `▁` for a space, bytes where a character has no token, and a decoder
    that strips the space in front of a text."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    letters = [letter for letter in sorted(set("▁" + "".join(words))) if letter not in pieces]
    scores = [(piece, -1.0 - len(pieces) / (1 + len(piece))) for piece in dict.fromkeys([*pieces, *letters])]
    made = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(
        [tokenizers.AddedToken(n, special=True, normalized=False) for n in ("<unk>", "<s>", "</s>")]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder
