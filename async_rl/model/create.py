"""A new small model with random weights and a tokenizer of its own; `async-rl init-model` warms such a model up.

A tokenizer has one token for each character of an alphabet, or one for each byte. Both kinds end with `<|end|>` (end of
text) and `<|pad|>`, and transformers' AutoTokenizer loads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, Rope, config_values
from async_rl.model.folder import CONFIG, save_folder
from async_rl.model.tokenizer import Tokenizer

END, PAD = "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def create_model_folder(
    path: str | Path,
    *,
    alphabet: str,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    intermediate: int = 384,
    max_context: int = 256,
    tied: bool = True,
    seed: int = 0,
) -> DecoderConfig:
    """Write a folder with a random Qwen3 decoder and a character tokenizer of `alphabet`.

    Raises UserError when `path` exists and is not an empty folder, or the sizes do not fit each other.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; remove it or choose another path for the new model")
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads}) and head_dim ({head_dim}) even")
    vocabulary = write_character_tokenizer(folder, alphabet)
    config = DecoderConfig(
        family="qwen3",
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=max_context,
        rope=Rope(theta=10_000.0),
        qk_norm=True,
        tied=tied,
    )
    write_random_weights(folder, config, seed=seed)
    return config


def write_random_weights(folder: Path, config: DecoderConfig, *, seed: int) -> None:
    """Write config.json and random weights of `config` into `folder`, which holds the tokenizer."""
    from async_rl.model.decoder import Decoder

    eos = Tokenizer(folder).eos_id
    values = config_values(config) | {"eos_token_id": eos, "pad_token_id": eos + 1}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    model = Decoder(config)
    model.initialise(seed)
    save_folder(folder, model, source=folder)


def write_character_tokenizer(folder: str | Path, alphabet: str) -> int:
    """Write tokenizer.json and tokenizer_config.json with one token per character of `alphabet`, in its order.

    Returns the number of tokens. Raises ValueError for an empty alphabet or a character twice.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet must hold each character once, it is {alphabet!r}")
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=""))
    # every character is a piece of its own, newlines included
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
    """Add the two special tokens and write both files. Returns the number of tokens."""
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
