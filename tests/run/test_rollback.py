"""A run whose alarm is raised goes back once, and nothing of the weights that were given up is trained: audited,
replayed, killed half-way, resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support_command import Run, wait_for, write_config
from support_run import quick_settings, train

from async_rl.buffer.store import StoreReader
from async_rl.config import Settings
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.replay import replay
from async_rl.instruments.rescore import rescore
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.observe.record import active_alarms, incidents
from async_rl.run.launcher import resume_training
from async_rl.run.resume import resumed_settings, start_of_rollback
from async_rl.run_folder import Rollback, RunFolder, read_rollback, read_rows, write_rollback
from async_rl.trainer.alarm import SIGNALS
from async_rl.trainer.manifest import list_checkpoints, version_of

NERVOUS = (
    "trainer.steps=14", "staleness.max_staleness=2", "recipe=grpo", "optimizer.learning_rate=0.05", "guard.window=3",
    "guard.ess=0.5", "guard.entropy=0", "guard.reward=0", "guard.gradient=0", "checkpoint.every=2",
    "evaluation.every=3", "wire.timeout_s=30",
)  # fmt: skip
"""a learning rate far too high, and an alarm that is raised long before the end"""
BACK = ("guard.rollback=true", "guard.rollback_lr_scale=0.001")


def events(folder: RunFolder, kind: str) -> list[dict[str, object]]:
    return [row for row in read_rows(folder.events) if row["event"] == kind]


def check_whole(folder: RunFolder) -> Rollback:
    """What must hold of a run that went back, however often it was killed."""
    back = read_rollback(folder)
    assert back is not None
    audit = audit_run(folder)
    assert not audit.violations
    assert audit.went_back
    replayed = replay(folder)
    assert replayed.difference is None
    rows = list(read_rows(folder.metrics))
    assert [row["step"] for row in rows] == list(range(14))
    assert all(("lr/rollback" in row) == (row["step"] >= back.at) for row in rows if row.get("lr/effective"))
    assert len(events(folder, "rollback")) == 1
    with StoreReader(folder.store) as store:
        refused = [row for row in store.groups() if (row.refused_because or "").startswith("rollback:")]
        assert refused
        again = {row.position for row in store.groups() if row.attempt == 1}
        assert {row.position for row in refused} >= again
        for t in store.trajectories(split="train"):
            assert t.step is None or t.step < back.at or t.version_min in (-1, *range(back.at, t.step + 1))
    versions = [version_of(path) for path in list_checkpoints(folder.checkpoints)]
    assert not [version for version in versions if back.to < version < back.at]
    summary = json.loads(folder.summary.read_text())
    assert summary["rollback"]["version"] == back.at
    return back


def test_an_alarm_is_told_of_everywhere_and_stays(tmp_path: Path, tiny_model: Path) -> None:
    folder = train(quick_settings(tiny_model, *NERVOUS), tmp_path / "run")
    (alarm,) = events(folder, "alarm")
    assert alarm["signal"] == "ess"
    rows = list(read_rows(folder.metrics))
    assert [row["alarm/ess"] for row in rows] == [float(row["step"] >= alarm["step"]) for row in rows]
    assert {row["alarm/reward"] for row in rows} == {0.0}
    (told,) = json.loads(folder.summary.read_text())["alarms"]
    assert told["reason"] == alarm["reason"]
    assert json.loads(folder.live.read_text())["alarms"][0]["text"] == alarm["reason"]
    assert [incident.name for incident in active_alarms(row.event for row in folder.read_events())] == ["alarm ess"]
    assert read_rollback(folder) is None
    assert not audit_run(folder).violations


def test_a_run_goes_back_once_and_nothing_is_lost_or_trained_twice(tmp_path: Path, tiny_model: Path) -> None:
    folder = train(quick_settings(tiny_model, *NERVOUS, *BACK), tmp_path / "run")
    back = check_whole(folder)
    names = [incident.name for incident in incidents(row.event for row in folder.read_events())]
    assert names[:2] == ["alarm ess", f"rollback to {back.to}"]
    assert names.count(f"rollback to {back.to}") == 1
    scored = rescore(folder, ["vcpo"])
    assert [step.step for step in scored.scores[0].steps] == list(range(14))


@pytest.mark.nightly
def test_a_finished_run_that_went_back_goes_on_at_the_lower_rate(tmp_path: Path, tiny_model: Path) -> None:
    folder = train(quick_settings(tiny_model, *NERVOUS, *BACK, "trainer.steps=8"), tmp_path / "run")
    before = read_rollback(folder)
    resume_training(folder.path, ["trainer.steps=14"], console=Console(silent=True))
    assert check_whole(folder) == before


def trained_since(folder: RunFolder) -> int:
    """Steps since the run went back."""
    if not folder.rollback.exists():
        return 0
    at = json.loads(folder.rollback.read_text())["at"]
    return sum(row["step"] >= at for row in read_rows(folder.metrics))


MOMENTS: dict[str, Callable[[RunFolder], bool]] = {
    "rollback.json is there": lambda folder: folder.rollback.exists(),
    "it is told of": lambda folder: bool(events(folder, "rollback")),
    "the buffer is back": lambda folder: len(events(folder, "buffer_ready")) == 2,
    "a step is trained": lambda folder: trained_since(folder) > 0,
}


@pytest.mark.nightly
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_it_goes_back_is_resumed_there(moment: str, tmp_path: Path, tiny_model: Path) -> None:
    run = Run(write_config(tmp_path, tiny_model, *NERVOUS, *BACK), RunFolder(tmp_path / "run"))
    wait_for(lambda: MOMENTS[moment](run.folder) or run.process.poll() is not None, moment, 60.0)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.communicate()
    resume_training(run.folder.path, [], console=Console(silent=True))
    check_whole(run.folder)


def gone_back_late(settings: Settings, tmp_path: Path) -> RunFolder:
    """A run that went back to a checkpoint of its own. When the alarm is raised depends on how stale the data were, and
    so on the machine: a run that raised none, or too early, is followed by one of another seed."""
    for number in range(6):
        folder = train(replace(settings, seed=number), tmp_path / f"run-{number}")
        back = read_rollback(folder)
        if back is not None and back.to > 0:
            return folder
    pytest.fail("none of six runs went back to a checkpoint of its own")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), marks=pytest.mark.nightly),
        pytest.param(("checkpoint.every=5", "checkpoint.keep=1", "guard.rollback=false"), marks=pytest.mark.nightly),
    ],
)
def test_a_damaged_checkpoint_is_trained_anew_before_the_run_goes_back(
    changes: tuple[str, ...], tmp_path: Path, tiny_model: Path
) -> None:
    """The one it went back to: the run reaches the same step again, and goes back as it did; also where no checkpoint
    is due at that step any more."""
    settings = quick_settings(tiny_model, *NERVOUS, *BACK, "checkpoint.keep=20", "optimizer.warmup_steps=8")
    folder = gone_back_late(settings, tmp_path)
    back = check_whole(folder)
    for path in list_checkpoints(folder.checkpoints):
        if version_of(path) >= back.to:
            (path / "learner.json").write_text("torn")
    folder.summary.unlink()
    if "guard.rollback=false" in changes:
        changes = (*changes, "guard.rollback_lr_scale=0.3")
    resume_training(folder.path, changes, console=Console(silent=True))
    assert check_whole(folder) == back


def gone_back(tmp_path: Path, tiny_model: Path, *words: str) -> tuple[RunFolder, Settings]:
    """The folder of a run that is to go back from version 9 to 4, and has no checkpoint."""
    folder, settings = RunFolder(tmp_path / "run"), quick_settings(tiny_model, *NERVOUS, *BACK, *words)
    folder.create(settings)
    back = Rollback(
        at=9, to=4, since=6, signal="ess", reason="alarm ess", lr_scale=0.001, progress={}, time=0.0
    )  # fmt: skip
    write_rollback(folder, back)
    return folder, settings


def test_a_checkpoint_that_stays_damaged_ends_the_run_and_is_not_trained_for_ever(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder, settings = gone_back(tmp_path, tiny_model)
    assert start_of_rollback(folder, settings, [0]).version == 0
    assert start_of_rollback(folder, settings, [2, 2]).version == 0
    with pytest.raises(RunFailed, match="cannot go back to version 4: it was trained again from version 0 on"):
        start_of_rollback(folder, settings, [0, 0])


def test_the_rate_after_going_back_cannot_change_once_it_went_back(tmp_path: Path, tiny_model: Path) -> None:
    folder, _ = gone_back(tmp_path, tiny_model)
    with pytest.raises(UserError, match=r"went back at step 8, once and for all with a factor of 0\.001"):
        resumed_settings(folder, ["guard.rollback_lr_scale=0.1"])
    resumed_settings(folder, ["guard.rollback=false", "guard.rollback_lr_scale=0.3"])
    resumed_settings(folder, ["checkpoint.every=5"])
    folder.rollback.unlink()
    resumed_settings(folder, ["guard.rollback_lr_scale=0.1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("guard.rollback=true", "checkpoint.every=0"), "checkpoint.every"),
        (("guard.rollback=true", "generator.count=0"), "generator.count=0 nobody would generate"),
        (("guard.rollback_lr_scale=0.1",), "does nothing with guard.rollback=false"),
        (("guard.alarms=false", "guard.rollback=true"), "does nothing with guard.alarms=false"),
        (("guard.entropy=0.5",), "a factor above 1"),
        (("guard.rollback=true", *(f"guard.{signal}=0" for signal in SIGNALS)), "every alarm"),
    ],
)
def test_settings_that_promise_nothing_are_refused(overrides: tuple[str, ...], message: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=message):
        quick_settings(tiny_model, *overrides)
