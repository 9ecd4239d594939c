"""Several ranks take the step that one process takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support_ranks as support
import torch
from safetensors.torch import load_file
from torch import Tensor

from async_rl.trainer.ranks import one_rank

SIZES = (2, 4)
TOLERANCE = 1e-11
"""of weights around 1 in float64, behind two steps that moved them by about 0.03; sums are in another order"""
NOT_COMPARED = ("batch/micro_batches", "batch/rank_imbalance")
"""metrics that say how the work was shared"""

Outcome = tuple[dict[str, Tensor], list[dict[str, float]]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """What one process does, by name of the case."""
    return {case.name: support.outcome(case, one_rank(), "none") for case in support.CASES}


@pytest.fixture(scope="module", params=SIZES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The folder with what that many ranks did."""
    size: int = request.param
    folder = tmp_path_factory.mktemp(f"ranks{size}")
    support.start(support.__file__, folder, size)
    return size, folder


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("number", range(len(support.CASES)), ids=[case.name for case in support.CASES])
def test_ranks_take_the_step_of_one_process(
    number: int, sharding: str, together: tuple[int, Path], alone: dict[str, Outcome]
) -> None:
    size, folder = together
    if support.CASES[number].lora and sharding == "full":
        pytest.skip("refused at load: adapters are added to whole weights")
    want, metrics = alone[support.CASES[number].name]
    before = dict(support.make_model(support.CASES[number].config, 1).named_parameters())
    assert max(float((want[name] - p).detach().abs().max()) for name, p in before.items()) > 1e-3
    every = [load_file(folder / f"{number}-{sharding}.{rank}.safetensors") for rank in range(size)]
    for name, tensor in want.items():
        assert all(torch.equal(every[0][name], other[name]) for other in every[1:]), f"ranks have parted: {name}"
        torch.testing.assert_close(every[0][name], tensor, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    found = json.loads((folder / f"{number}-{sharding}.0.json").read_text())
    for row, one in zip(found, metrics, strict=True):
        assert row.keys() - {"batch/rank_imbalance"} == one.keys()
        for name in one.keys() - set(NOT_COMPARED):
            assert row[name] == pytest.approx(one[name], rel=1e-8, abs=1e-10, nan_ok=True), name
