"""Stopped processes on real runs: named, ended, replaced; and left alone when they are only slow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import Run, write_config

from async_rl.run_folder import RunFolder, read_rows

FROZEN_S = 3.0


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    def begin(*overrides: str, **environment: str) -> Run:
        config = write_config(tmp_path, tiny_model, f"wire.frozen_after_s={FROZEN_S}", *overrides)
        return Run(config, RunFolder(tmp_path / "run"), environment=environment)

    return begin


def steps(run: Run) -> int:
    return sum(1 for _ in read_rows(run.folder.metrics))


def rows(run: Run, event: str) -> list[dict]:  # type: ignore[type-arg]
    return [row for row in read_rows(run.folder.events) if row["event"] == event]


def test_a_stopped_generator_is_ended_and_started_anew_and_the_run_finishes(start: Callable[..., Run]) -> None:
    run = start("trainer.steps=80", "generator.count=2")
    run.wait_for(lambda: any(row["generators"] == 2 for row in read_rows(run.folder.metrics)), "two generators")
    stopped = run.pid("generator-1")
    os.kill(stopped, signal.SIGSTOP)
    run.wait_for_event("generator_died")
    assert steps(run) < 80, "its permits were needed"
    said = run.said()
    assert run.process.returncode == 0, said
    frozen = rows(run, "process_frozen")
    assert [(row["name"], row["pid"]) for row in frozen] == [("generator-1", stopped)]
    assert "it is frozen" in frozen[0]["reason"]
    assert steps(run) == 80
    assert "generator-1 is started again" in said
    assert run.left_behind() == []


@pytest.mark.parametrize("name", ["buffer", "trainer"])
def test_without_buffer_or_trainer_the_run_ends_and_names_it(start: Callable[..., Run], name: str) -> None:
    run = start("trainer.steps=100000")
    run.wait_for_training()
    os.kill(run.pid(name), signal.SIGSTOP)
    stopped = time.monotonic()
    said = run.said()
    assert time.monotonic() - stopped < 30
    assert run.process.returncode == 1
    assert f"async-rl: {name} gave no sign of life for " in said
    assert f"(wire.frozen_after_s={FROZEN_S:g}): it is frozen" in said
    assert "last heard: " in said
    assert "Traceback" not in said
    assert run.left_behind() == []
