"""Triton's kernels without a GPU: their values in Triton's interpreter, and that they compile for Hopper as meant."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support_triton import ROOT, run_with_triton

INTERPRETED = ROOT / "tests" / "kernels" / "interpreted"
SHARED_MEMORY = 227 * 1024
"""bytes a block can have on Hopper"""
REGISTERS = 65_536
"""of a multiprocessor"""


def test_kernels_give_what_their_definitions_give_in_the_interpreter() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in INTERPRETED.glob("*.py"))
    assert len(files) == 2
    said = run_with_triton("-m", "pytest", "-v", "-p", "no:cacheprovider", *files, interpret=True)
    assert "passed" in said
    assert "skipped" not in said


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return json.loads(run_with_triton("tests/support_triton_compile.py", interpret=False).splitlines()[-1])


def test_every_kernel_compiles_for_hopper_without_a_register_spilled(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) >= 8
    for name, found in compiled.items():
        assert found["spilled_bytes"] == 0, name
        assert 0 < found["registers"] * found["threads"] <= REGISTERS, name
        assert found["shared_bytes"] <= SHARED_MEMORY, name


def test_products_use_hoppers_matrix_instructions_and_run_ahead_of_memory(compiled: dict[str, dict[str, int]]) -> None:
    for name, found in compiled.items():
        if name.startswith(("gram", "weight")):
            assert found["wgmma"] > 0, name
            assert found["wgmma_in_flight"] > 0, name
            assert found["asynchronous_copies"] > 0, name


def test_tiles_of_logits_are_read_sixteen_bytes_at_a_time(compiled: dict[str, dict[str, int]]) -> None:
    for name, found in compiled.items():
        if name.startswith(("sums", "gradient")):
            assert found["wide_loads"] > 0, name


def test_the_package_imports_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, async_rl_kernels as k\n"
        "assert k.backend('cpu') == 'torch'\n"
        "k.linear_logprob(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
