"""A trainer of several ranks in real processes: the numbers of one, and an end whatever happens to a rank."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support_command import Run, alive, descendants, wait_for, write_config
from support_run import quick_settings, train

from async_rl.instruments.synchronous import train_synchronously
from async_rl.model.folder import load_tensors
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.learner import StepReport

SYNCHRONOUS = ("staleness.max_staleness=0", "recipe=grpo", "batch.groups_per_step=4", "evaluation.every=0")
ENDLESS = ("trainer.ranks=2", "trainer.steps=100000", "evaluation.every=0", "checkpoint.every=1")
SAME = ("reward/mean", "grad/norm", "entropy", "ess/ratio", "lr/effective", "batch/policy_tokens", "kl/behaviour")


def test_a_run_goes_on_over_other_numbers_of_ranks_as_if_nothing_had_happened(tmp_path: Path, tiny_model: Path) -> None:
    words = (*SYNCHRONOUS, "checkpoint.every=2")
    folder = train(quick_settings(tiny_model, *words, "trainer.steps=2", "trainer.ranks=2"), tmp_path / "run")
    quiet = Console(quiet=True)
    resume_training(folder.path, ["trainer.steps=4", "trainer.ranks=1"], console=quiet)
    resume_training(folder.path, ["trainer.steps=6", "trainer.ranks=2", "trainer.sharding=full"], console=quiet)

    reference: list[StepReport] = []
    settings = quick_settings(tiny_model, *words, "trainer.steps=6")
    learner = train_synchronously(settings, lambda _, report: reference.append(report))
    rows = list(read_rows(folder.metrics))
    assert [row["step"] for row in rows] == list(range(6))
    for row, report in zip(rows, reference, strict=True):
        for name in SAME:
            assert row[name] == pytest.approx(report.metrics[name], rel=1e-4, abs=1e-6), (row["step"], name)
    assert ["ranks/step_skew" in row for row in rows] == [True] * 2 + [False] * 2 + [True] * 2
    (last,) = folder.checkpoints.glob("step_000006")
    weights = load_tensors(last)
    for name, tensor in learner.weights().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    # a canary passed each version, so generators held what was published
    assert RunFolder(folder.path).summary.exists()


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    def begin(*overrides: str) -> Run:
        config = write_config(tmp_path, tiny_model, *ENDLESS, *overrides)
        run = Run(config, RunFolder(tmp_path / "run"))
        run.wait_for(lambda: "checkpoint" in run.events(), "a checkpoint")
        return run

    return begin


def ranks_of(run: Run) -> list[int]:
    """Process numbers of the ranks, in order."""
    found = {}
    for pid in descendants(run.pid("trainer")):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = pid
    assert sorted(found) == [0, 1]
    return [found[0], found[1]]


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (1, r"rank 1 was killed from outside \(SIGKILL\).*trainer-rank-1\.log"),
        pytest.param(0, r"rank 0 was killed from outside \(SIGKILL\).*trainer\.log", marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_name_and_its_log(
    start: Callable[..., Run], rank: int, said: str
) -> None:
    run = start()
    os.kill(ranks_of(run)[rank], signal.SIGKILL)
    out = run.said()
    assert run.process.returncode == 1, out
    assert re.search(said, out), out
    assert "--resume" in out
    assert run.left_behind() == []


@pytest.mark.nightly
def test_a_frozen_follower_is_named_and_the_run_ends(start: Callable[..., Run]) -> None:
    run = start("wire.frozen_after_s=3")
    os.kill(ranks_of(run)[1], signal.SIGSTOP)
    out = run.said()
    assert run.process.returncode == 1, out
    assert re.search(r"trainer-rank-1 gave no sign of life for .* it is frozen .*; it was ended", out), out
    assert run.left_behind() == []


@pytest.mark.nightly
def test_no_rank_outlives_what_started_it_and_the_run_can_be_resumed(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start()
    ranks = ranks_of(run)
    run.seen |= descendants(run.process.pid)
    os.kill(run.pid("trainer"), signal.SIGKILL)  # torch's agent
    out = run.said()
    assert run.process.returncode == 1, out
    assert "trainer was killed from outside (SIGKILL)" in out
    wait_for(lambda: not any(map(alive, ranks)), "the end of the ranks")
    assert run.left_behind() == []
    done = max(row["step"] for row in read_rows(run.folder.metrics)) + 2
    resume_training(run.folder.path, [f"trainer.steps={done}", "trainer.ranks=1"], console=Console(quiet=True))
    assert [row["step"] for row in read_rows(run.folder.metrics)] == list(range(done))


@pytest.mark.nightly
def test_ctrl_c_ends_all_ranks_and_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.seen |= descendants(run.process.pid)
    run.press_ctrl_c()
    out = run.said()
    assert run.process.returncode == 130, out
    assert "stopped by SIGINT" in out
    assert "Traceback" not in out
    assert "ended_by_force" not in run.events()
    assert run.left_behind() == []


@pytest.mark.nightly
def test_no_rank_outlives_a_killed_launcher(start: Callable[..., Run]) -> None:
    run = start()
    seen = descendants(run.process.pid)
    run.process.kill()
    run.process.communicate()
    wait_for(lambda: not any(map(alive, seen)), "the end of every process of the run")
