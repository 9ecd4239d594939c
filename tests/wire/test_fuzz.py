"""The coverage-guided search for inputs that break the buffer runs, and finds none in a few seconds."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "fuzz_wire.py"


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
def test_a_guided_search_finds_no_input_that_breaks_the_buffer(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "-max_total_time=5", "-seed=7", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob("crash-*"))
    tried = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    assert tried is not None
    assert int(tried[1]) > 1000
