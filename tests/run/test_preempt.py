"""A scheduler ends the job: the step in hand is finished, a checkpoint written, and a resume repeats nothing."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import Run, alive, run_command, write_config

from async_rl.events import RunInterrupted, RunResumed
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.manifest import list_checkpoints

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Start:
    def begin(*overrides: str) -> Run:
        words = ["trainer.steps=100000", "checkpoint.every=100000", "trainer.threads=1", *overrides]
        run = Run(write_config(tmp_path, tiny_model, *words), RunFolder(tmp_path / "run"))
        run.wait_for_training()
        run.wait_for(lambda: len(steps(run)) >= 4, "four steps")
        return run

    return begin


def steps(run: Run) -> list[int]:
    return [int(row["step"]) for row in read_rows(run.folder.metrics)]


def events(run: Run, kind: type) -> list[object]:
    return [row.event for row in run.folder.read_events() if isinstance(row.event, kind)]


@pytest.mark.parametrize(
    ("order", "whole"),
    [
        pytest.param(signal.SIGTERM, True, id="term-to-all"),
        pytest.param(signal.SIGUSR1, False, id="usr1", marks=pytest.mark.nightly),
        pytest.param(signal.SIGTERM, False, id="term", marks=pytest.mark.nightly),
        pytest.param(signal.SIGHUP, False, id="hup", marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR1, True, id="usr1-to-all", marks=pytest.mark.nightly),
    ],
)
def test_nothing_trained_is_lost_or_trained_again(start: Start, order: signal.Signals, whole: bool) -> None:
    """`whole`: every process of the run gets the signal at once, as from a scheduler that ends a job."""
    run = start()
    for pid in [run.process.pid, *([run.pid(n) for n in ("buffer", "trainer", "generator-0")] if whole else [])]:
        os.kill(pid, order)
    said = run.said()
    assert run.process.returncode == 128 + order, said
    assert f"{order.name}: finishing the step in hand and writing a checkpoint, within 25 s" in said
    assert run.left_behind() == []
    assert not any(alive(pid) for pid in run.seen)
    done = len(steps(run))
    assert [path.name for path in list_checkpoints(run.folder.checkpoints)] == [f"step_{done:06d}"]
    assert events(run, RunInterrupted) == [RunInterrupted(signal=order.name, version=done)]
    assert f"goes on with it, at step {done}" in said

    again = run_command("run", "--resume", run.folder.path, f"trainer.steps={done + 3}")
    assert again.returncode == 0, again.stderr
    assert re.search(rf"resuming .* at step {done} from step_", again.stdout)
    assert [event.version for event in events(run, RunResumed)] == [done]  # type: ignore[attr-defined]
    assert steps(run) == list(range(done + 3))
    audit = run_command("audit", run.folder.path)
    assert audit.returncode == 0, audit.stdout


@pytest.mark.nightly
def test_without_signals_named_the_run_ends_at_once(start: Start) -> None:
    run = start("checkpoint.signals=[]")
    run.process.terminate()
    said = run.said()
    assert run.process.returncode == 128 + signal.SIGTERM
    assert "finishing the step" not in said
    assert list_checkpoints(run.folder.checkpoints) == []
    assert "goes on with it, at step 0" in said


@pytest.mark.nightly
def test_a_trainer_of_two_ranks_saves_too(start: Start) -> None:
    run = start("trainer.ranks=2")
    run.process.terminate()
    said = run.said()
    assert run.process.returncode == 128 + signal.SIGTERM, said
    assert len(list_checkpoints(run.folder.checkpoints)) == 1
    assert run.left_behind() == []
