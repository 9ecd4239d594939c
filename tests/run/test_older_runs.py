"""A run folder that 0.1.0 wrote: killed with SIGKILL behind its first checkpoint, of step 4 of 12.

It goes on under this version: nothing of it is lost, and its batches give the weights that 0.1.0 recorded. The folder
lies in `tests/data/run_0.1.0.tar.xz`.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows

ARCHIVE = Path(__file__).parent.parent / "data" / "run_0.1.0.tar.xz"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Unpacked; its settings name the model relative to the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "run")


def test_the_batches_of_an_older_version_give_its_weights(old_run: RunFolder) -> None:
    result = replay(old_run, until=4)
    assert result.difference is None
    assert (result.version, result.begun) == (4, 0)


def test_a_run_of_an_older_version_is_resumed_to_its_end(old_run: RunFolder) -> None:
    before = [row for row in read_rows(old_run.metrics) if row["step"] < 4]
    done = subprocess.run(
        [sys.executable, "-m", "async_rl", "run", "--resume", "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at step 4 from step_000004" in done.stdout
    rows = list(read_rows(old_run.metrics))
    assert rows[:4] == before
    assert [row["step"] for row in rows][-8:] == list(range(4, 12))
    audit = audit_run(old_run)
    assert not audit.violations
    result = replay(old_run)
    assert result.difference is None
    assert (result.version, result.begun) == (12, 0)
