"""A run whose trainer somebody else starts, with torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support_command import Run, alive, descendants, wait_for, write_config

from async_rl.run_folder import RunFolder, read_rows

EXTERNAL = ("trainer.start=external", "trainer.ranks=2", "evaluation.every=0")


def torchrun(run: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """As a scheduler would; `python -m torch.distributed.run` is torchrun."""
    words = ["--standalone", "--nproc-per-node", str(ranks), "-m", "async_rl", "train", str(run)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_torchrun_trains_a_run_that_waits_for_it(tmp_path: Path, tiny_model: Path) -> None:
    run = Run(write_config(tmp_path, tiny_model, *EXTERNAL, "trainer.steps=3"), RunFolder(tmp_path / "run"))
    run.wait_for_event("trainer_awaited")
    wrong = torchrun(run.folder.path, ranks=1)
    out, _ = wrong.communicate(timeout=60)
    assert "1 rank started, but the run waits for trainer.ranks=2" in out
    trainer = torchrun(run.folder.path)
    said = run.said()
    out, _ = trainer.communicate(timeout=60)
    assert run.process.returncode == 0, said + out
    assert trainer.returncode == 0, out
    assert f"torchrun --standalone --nproc-per-node 2 -m async_rl train {run.folder.path}" in said
    assert [row["step"] for row in read_rows(run.folder.metrics)] == [0, 1, 2]
    assert run.left_behind() == []


def test_nobody_starts_it(tmp_path: Path, tiny_model: Path) -> None:
    run = Run(write_config(tmp_path, tiny_model, *EXTERNAL, "trainer.start_timeout_s=1"), RunFolder(tmp_path / "run"))
    said = run.said()
    assert run.process.returncode == 1
    assert "nobody has started the trainer within 1 s (trainer.start_timeout_s)" in said
    assert run.left_behind() == []


@pytest.mark.nightly
@pytest.mark.parametrize("ends", ["trainer", "launcher"])
def test_neither_side_outlives_the_other(ends: str, tmp_path: Path, tiny_model: Path) -> None:
    words = (*EXTERNAL, "trainer.steps=100000", "wire.frozen_after_s=3")
    run = Run(write_config(tmp_path, tiny_model, *words), RunFolder(tmp_path / "run"))
    run.wait_for_event("trainer_awaited")
    trainer = torchrun(run.folder.path)
    run.wait_for_training()
    ranks = descendants(trainer.pid)
    if ends == "trainer":
        trainer.terminate()  # torchrun ends its ranks
        said = run.said()
        assert run.process.returncode == 1
        assert "trainer" in said
        assert "--resume" in said
    else:
        run.process.kill()
        run.process.communicate()
    trainer.communicate(timeout=60)
    assert trainer.returncode != 0
    wait_for(lambda: not any(map(alive, ranks | run.seen)), "the end of every process")
