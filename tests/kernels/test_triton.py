"""Triton's kernels without a GPU: their values in Triton's interpreter, and that they compile for every target, for
Hopper as meant."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support_triton import ROOT, run_with_triton

INTERPRETED = ROOT / "tests" / "kernels" / "interpreted"
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB that a block can have, by compute capability (CUDA C++ programming guide, technical specifications)"""
SPILLED = {("gram 1", 120): 8, ("gram 3", 120): 40}
"""bytes a thread that do not fit its registers: two and ten numbers of the largest products, on consumer Blackwell"""
REGISTERS = 65_536
"""of a multiprocessor"""


def test_kernels_give_what_their_definitions_give_in_the_interpreter() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in INTERPRETED.glob("*.py"))
    assert len(files) == 2
    said = run_with_triton("-m", "pytest", "-v", "-p", "no:cacheprovider", *files, interpret=True)
    assert "passed" in said
    assert "skipped" not in said


def compile_for(capability: int) -> dict[str, dict[str, int]]:
    said = run_with_triton("tests/support_triton_compile.py", str(capability), interpret=False)
    return json.loads(said.splitlines()[-1])[str(capability)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return compile_for(90)


def check_fits(compiled: dict[str, dict[str, int]], capability: int) -> None:
    assert len(compiled) >= 8
    for name, found in compiled.items():
        assert found["spilled_bytes"] <= SPILLED.get((name, capability), 0), name
        assert 0 < found["registers"] * found["threads"] <= REGISTERS, name
        assert found["shared_bytes"] <= SHARED_MEMORY[capability] * 1024, name


def test_every_kernel_compiles_for_hopper_without_a_register_spilled(compiled: dict[str, dict[str, int]]) -> None:
    check_fits(compiled, 90)


@pytest.mark.parametrize(
    "capability", [100, *(pytest.param(c, marks=pytest.mark.nightly) for c in (80, 86, 89, 103, 120))]
)
def test_every_kernel_compiles_for_the_other_gpus(capability: int) -> None:
    """100 is Blackwell for servers, where sums over one dimension after another did not compile (Triton 3.7.1)."""
    check_fits(compile_for(capability), capability)


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
