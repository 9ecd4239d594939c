"""examples/slurm.sbatch, played through with a stand-in for SLURM's `scontrol`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import wait_for, write_config

from async_rl.run_folder import RunFolder, read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm.sbatch"


@pytest.mark.nightly
def test_a_job_that_is_ended_and_queued_again_trains_every_step_once(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=100000", "checkpoint.every=100000")
    commands = tmp_path / "bin"
    commands.mkdir()
    write(commands / "scontrol", 'echo "$@" >> "$(dirname "$0")/requeued"')
    write(commands / "async-rl", f'exec "{sys.executable}" -m async_rl "$@"')
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job",
    }  # fmt: skip
    run = RunFolder(tmp_path / "runs" / "job-7")

    done = [0]
    for _ in range(2):
        job = subprocess.Popen(["bash", str(SCRIPT), str(config)], cwd=tmp_path, env=environment, text=True)
        wait_for(lambda: len(list(read_rows(run.metrics))) >= done[-1] + 3, "three steps of this life")
        job.send_signal(signal.SIGUSR1)  # to the script alone, as with --signal=B:USR1@120
        assert job.wait(60) == 128 + signal.SIGUSR1
        done.append(len(list(read_rows(run.metrics))))
    assert (commands / "requeued").read_text().splitlines() == ["requeue 7"] * 2
    resumed = [row["version"] for row in read_rows(run.events) if row["event"] == "resumed"]
    assert resumed == [done[1]]
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(done[-1]))


def write(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)
