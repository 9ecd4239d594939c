"""A little of bench/fuzz_input.py: what people and their agents give raises what names it, or nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from fuzz_input import play


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        ("request", 1000),
        ("answer", 1000),
        ("rows", 40),
        ("settings", 40),
        ("blobs", 300),
        ("messages", 1000),
        ("agents", 120),
    ],
)
def test_bent_input_raises_nothing_else(target: str, inputs: int, tmp_path: Path) -> None:
    assert play(target, inputs, 1, tmp_path) == (inputs, [])
