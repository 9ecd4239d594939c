"""Every example runs from an empty folder, as a user starts it, and prints what examples/README.md shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAST_LINE = {
    "01_own_reward.py": r"letters in place: 0\.\d\d -> 0\.\d\d",
    "02_own_task.py": r"games won: \d+% -> \d+%",
    "03_own_recipe.py": r"mean weight of a token: [01]\.\d\d in the first step, [01]\.\d\d in the last",
    "04_own_data.py": r"right: \d+% before, \d+% after",
    "05_run_and_plot.py": r"curves: (curves\.png|runs/plot-.*/report\.html)",
    "06_join_generator.py": r"trajectories by generator: \{.*'generator-0': \d+.*\}",
    "07_agent_endpoint.py": r"reward: [01]\.\d\d -> [01]\.\d\d",
}
"""example -> the form of the last line that it prints"""


MORE = ("02_own_task.py", "04_own_data.py", "06_join_generator.py")
"""of which the other examples and tests of the same doors show enough in an ordinary run"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in MORE else name for name in LAST_LINE]
)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    steps = "200" if name == "06_join_generator.py" else "2"  # a run lasts until a process that starts has joined it
    words = [sys.executable, str(EXAMPLES / name), steps]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(LAST_LINE[name], done.stdout.splitlines()[-1]), done.stdout
    if name == "06_join_generator.py":
        assert "'second': " in done.stdout.splitlines()[-1], done.stdout
    if name == "05_run_and_plot.py":
        assert Path(tmp_path, done.stdout.splitlines()[-1].split()[-1]).stat().st_size > 5_000


def test_each_example_is_listed_and_is_a_page_long() -> None:
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert files == sorted(LAST_LINE)
    listed = (EXAMPLES / "README.md").read_text()
    for name in files:
        assert f"({name})" in listed, name
        assert len((EXAMPLES / name).read_text().splitlines()) <= 90, name
