"""A new small model with random weights: what `async-rl init-model` warms up."""

from __future__ import annotations

import json
from pathlib import Path

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, Rope, config_values
from async_rl.model.folder import CONFIG, save_folder
from async_rl.model.make_tokenizer import write_character_tokenizer
from async_rl.model.tokenizer import Tokenizer


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
    """Put config.json and random weights of `config` beside the tokenizer that lies in `folder`."""
    from async_rl.model.decoder import Decoder

    eos = Tokenizer(folder).eos_id
    values = config_values(config) | {"eos_token_id": eos, "pad_token_id": eos + 1}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    model = Decoder(config)
    model.initialise(seed)
    save_folder(folder, model, source=folder)
