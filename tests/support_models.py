"""Small model folders for tests: real architectures, random weights, a character tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from async_rl.model.architecture import DecoderConfig, Rope, config_values
from async_rl.model.create import write_character_tokenizer
from async_rl.model.decoder import Decoder
from async_rl.model.folder import save_folder

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz <>=+-*/()\n"

SMALL = DecoderConfig(
    family="qwen3",
    vocabulary=len(ALPHABET) + 2,
    hidden=32,
    intermediate=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_context=128,
)


def qwen3_config(**changes: Any) -> DecoderConfig:
    return replace(SMALL, **{"qk_norm": True, "tied": True} | changes)


def llama_config(**changes: Any) -> DecoderConfig:
    """Untied, with the context extension of Llama 3.1."""
    rope = Rope(theta=500.0, kind="llama3", factor=4.0, original_context=32)
    return replace(SMALL, **{"family": "llama", "rope": rope} | changes)


def qwen2_config(**changes: Any) -> DecoderConfig:
    return replace(SMALL, **{"family": "qwen2", "qkv_bias": True} | changes)


def mistral_config(**changes: Any) -> DecoderConfig:
    return replace(SMALL, **{"family": "mistral", "kv_heads": 1} | changes)


def make_decoder(config: DecoderConfig, seed: int = 0, std: float = 0.2) -> Decoder:
    """A decoder with weights large enough that its distributions are far from uniform; biases and norms
    are random too, so that none can be forgotten."""
    import torch

    model = Decoder(config)
    model.initialise(seed, std)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_folder(path: str | Path, config: DecoderConfig, seed: int = 0, alphabet: str = ALPHABET) -> Path:
    """A model folder of `config`, loadable with transformers."""
    folder = Path(path)
    vocabulary = write_character_tokenizer(folder, alphabet)
    config = replace(config, vocabulary=vocabulary)
    values = config_values(config) | {"eos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1}
    (folder / "config.json").write_text(json.dumps(values))
    save_folder(folder, make_decoder(config, seed), source=folder)
    return folder


def qwen3_folder(path: str | Path, seed: int = 0, **changes: Any) -> Path:
    return write_folder(path, qwen3_config(**changes), seed)


def llama_folder(path: str | Path, seed: int = 0, **changes: Any) -> Path:
    return write_folder(path, llama_config(**changes), seed)
