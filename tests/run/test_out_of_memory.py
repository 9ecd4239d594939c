"""A trainer that really runs out of memory says what to lower, and the run goes on with that."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import run_command
from support_run import quick_settings

from async_rl.config.schema import to_yaml
from async_rl.instruments.replay import replay
from async_rl.model.create import create_model_folder
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task

LIMIT_BYTES = 3 << 30
"""of address space a process, more than one of which torch takes by being there"""


@pytest.fixture
def greedy_model(tmp_path: Path) -> Path:
    """Little to compute, and a megabyte kept for each token's backward pass."""
    path = tmp_path / "greedy"
    alphabet = make_task("guess", {}).alphabet  # type: ignore[attr-defined]
    shape = {"hidden": 16, "layers": 4, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate": 32768}
    create_model_folder(path, alphabet=alphabet, max_context=32, **shape)  # type: ignore[arg-type]
    return path


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """In little memory, each process for itself."""
    return subprocess.run(
        [sys.executable, "-m", "async_rl", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES)),
    )


@pytest.mark.nightly
def test_a_trainer_without_memory_says_what_to_lower_and_the_run_goes_on_with_it(
    tmp_path: Path, greedy_model: Path
) -> None:
    config = tmp_path / "config.yaml"
    words = ("batch.groups_per_step=16", "batch.group_size=24", "trainer.steps=1", "recipe.name=grpo")
    words += ("trainer.shared_prefixes=false",)  # with them the step fits
    config.write_text(to_yaml(quick_settings(greedy_model, *words)))
    run = tmp_path / "run"
    failed = command("run", config, "--run-dir", run)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    said = failed.stderr
    assert "trainer: memory ran out: RuntimeError" in said
    assert "can't allocate memory" in said
    assert "Traceback" not in said
    remedy = r"lower trainer\.micro_batch_tokens \(now 16384, the largest of this step had (\d+)\) to (\d+)"
    found = re.search(remedy, said)
    assert found is not None, said
    had, proposed = int(found[1]), int(found[2])
    assert 256 <= proposed <= had // 2
    assert f"run --resume {run}" in said
    (event,) = (row for row in read_rows(RunFolder(run).events) if row["event"] == "out_of_memory")
    assert (event["step"], event["tokens"]) == (0, had)

    resumed = command("run", "--resume", run, f"trainer.micro_batch_tokens={proposed}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    folder = RunFolder(run)
    assert [row["step"] for row in read_rows(folder.metrics)] == [0]
    (resume,) = (row for row in read_rows(folder.events) if row["event"] == "resumed")
    assert resume["changed"] == {"trainer.micro_batch_tokens": [16384, proposed]}


@pytest.mark.nightly
def test_a_run_replays_to_the_bit_when_its_micro_batches_were_made_smaller_on_the_way(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(quick_settings(tiny_model, "trainer.steps=3")))
    run = tmp_path / "run"
    assert run_command("run", config, "--run-dir", run).returncode == 0
    more = run_command("run", "--resume", run, "trainer.steps=5", "trainer.micro_batch_tokens=40")
    assert more.returncode == 0, more.stderr
    rows = list(read_rows(RunFolder(run).metrics))
    assert rows[2]["batch/micro_batches"] == 1
    assert rows[4]["batch/micro_batches"] > 1
    result = replay(RunFolder(run))
    assert (result.version, result.difference) == (5, None)
    assert result.compared > 5
