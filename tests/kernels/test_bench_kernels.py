"""The sections of bench/kernels.py that are meant for a GPU run through, on a CPU and with tiny sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
TINY = {
    "device": "cpu", "head": (20, 8, 50), "layer": (60, 8, 12), "segments": 5, "copied": 960, "square": 16,
    "layers": 1, "width": 128, "vocabulary": 50, "trajectories": 32, "answer": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def sections() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    import kernels_gpu

    yield kernels_gpu
    sys.path.remove(str(BENCH))


@pytest.mark.parametrize("name", ["ceilings", "logprob", "norms", "head_sums", "opob_step"])
def test_a_section_measures_what_it_names(sections: Any, name: str) -> None:
    assert list(sections.SECTIONS) == ["ceilings", "logprob", "norms", "head_sums", "opob_step"]
    found = sections.SECTIONS[name](1, sections.Where(**TINY))
    rows = {"norms": found.get("ragged")}.get(name, found)
    measured = [row["ms"] for row in rows.values() if isinstance(row, dict)]
    assert len(measured) >= 2
    assert all(ms >= 0 for ms in measured)
    if name == "opob_step":
        assert found["exact_over_group_mean"] > 0
        assert found["micro_batches"] == 2
