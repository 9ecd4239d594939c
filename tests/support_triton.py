"""Triton for tests on a machine without a GPU: where `make triton` put it, and processes that use it.

It stays out of the environment's own packages, so that nothing else finds it. A process decides when it imports
Triton whether kernels are interpreted or compiled; so both have processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(sys.prefix) / "triton"


def run_with_triton(*arguments: str, interpret: bool) -> str:
    """stdout of `python ARGUMENTS`, started in the repository. Skips the test where there is no Triton."""
    if not FOLDER.is_dir() and find_spec("triton") is None:
        pytest.skip("Triton is not installed: make triton")
    paths = [str(FOLDER)] * FOLDER.is_dir() + [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
