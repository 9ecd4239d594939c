"""What a rehearsal puts in the place of a model and of data that are not here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from async_rl.errors import UserError
from async_rl.model.architecture import FAMILIES, DecoderConfig, Family
from async_rl.model.create import write_random_weights
from async_rl.model.folder import read_config
from async_rl.model.make_tokenizer import write_byte_tokenizer

CONTEXT = 16_384
"""tokens, which are bytes"""
ROWS = 64
UNKNOWN: Family = "qwen3"


def family_of(path: str) -> tuple[Family, bool]:
    """(family, whether the head is tied) of the model folder, or, when it is not here, by its name. Models of other
    families are rehearsed with a Qwen3."""
    if Path(path).is_dir():
        try:
            config = read_config(path)
        except UserError:
            config = None
        return (config.family, config.tied) if config is not None else (UNKNOWN, True)
    name = Path(path).name.lower().replace(".", "").replace("-", "").replace("_", "")
    starts = {"qwen25": "qwen2", **{family: family for family in FAMILIES}}
    found = next((family for start, family in starts.items() if start in name), UNKNOWN)
    return found, False  # type: ignore[return-value]


def tiny_config(family: Family, *, tied: bool, vocabulary: int) -> DecoderConfig:
    """Two layers, a hundred thousand parameters."""
    return DecoderConfig(
        family=family,
        vocabulary=vocabulary,
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        max_context=CONTEXT,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=tied,
    )


def write_tiny_model(folder: Path, like: str, *, seed: int) -> DecoderConfig:
    """A random model of the family of `like`, whose tokens are bytes."""
    family, tied = family_of(like)
    config = tiny_config(family, tied=tied, vocabulary=write_byte_tokenizer(folder))
    write_random_weights(folder, config, seed=seed)
    return config


def write_data(path: Path, args: Mapping[str, Any], *, seed: int) -> None:
    """JSON lines with the prompt and answer fields that the task's `args` name: sums of two numbers."""
    random = Random(seed)
    lines = []
    for number in range(ROWS):
        left, right = random.randrange(10, 100), random.randrange(10, 100)
        row: dict[str, Any] = {
            args.get("prompt_field", "prompt"): f"Problem {number}: what is {left} plus {right}?"
        }
        if answer := args.get("answer_field", "answer"):
            row[answer] = str(left + right)
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
