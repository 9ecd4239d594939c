"""Clocks on real runs: the wall clock is set back and forth under every process, and a laptop sleeps."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import Run, descendants, starter

from async_rl.buffer.core import Core
from async_rl.buffer.loop import receive
from async_rl.buffer.store import StoreReader
from async_rl.observe.audit import audit_run
from async_rl.run_folder import read_rows
from async_rl.steady_clock import steady_time

FROZEN_S = 3.0
ALARMED = {"process_frozen", "generator_died", "generator_lost", "generator_rejoined", "stall", "failed"}

JUMPING = '''
"""The clock on the wall is set every quarter of a second: an hour back, an hour on, right again."""
import time
_time, _time_ns = time.time, time.time_ns
def _shift():
    return (0, -3600, 3600)[int(4 * time.monotonic()) % 3]
time.time = lambda: _time() + _shift()
time.time_ns = lambda: _time_ns() + _shift() * 10**9
'''


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    return starter(tmp_path, tiny_model, f"wire.frozen_after_s={FROZEN_S}")


def test_a_wall_clock_that_jumps_changes_nothing(start: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join(filter(None, [str(tmp_path / "clock"), os.environ.get("PYTHONPATH", "")]))
    run = start("trainer.steps=30", "evaluation.every=15", "generator.count=2", PYTHONPATH=path)
    said = run.said()
    assert run.process.returncode == 0, said
    assert not run.events() & ALARMED
    rows = list(read_rows(run.folder.metrics))
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert times[-1] - times[0] < 120
    assert all(value >= 0 for row in rows for key, value in row.items() if key.startswith(("time/", "lag/")))
    with StoreReader(run.folder.store) as store:
        spent = [t.finished_at - t.started_at for t in store.trajectories(split="train")]
        formed = [batch.formed_at for batch in store.batches()]
    assert spent
    assert all(0 <= seconds < 60 for seconds in spent)
    assert formed == sorted(formed)
    assert audit_run(run.folder).violations == ()


def test_the_buffers_clock_is_not_the_one_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back by an hour, it would take nobody for frozen and send no lost permit again, for an hour."""
    told: list[float] = []

    class Silent:
        def receive(self, _: float) -> None:
            return None

    class Clocked:
        def tick(self, now: float) -> list[object]:
            told.append(now)
            return []

    hour = 3600.0
    for shift in (0.0, -hour, hour):
        wall = time.time() + shift
        with monkeypatch.context() as there:
            there.setattr(time, "time", lambda wall=wall: wall)
            core: Core = Clocked()  # type: ignore[assignment]
            receive(Silent(), core, 1)  # type: ignore[arg-type]
    assert told == sorted(told)
    assert told[-1] - told[0] < 60
    assert abs(steady_time() - time.time()) < 600


@pytest.mark.nightly
@pytest.mark.parametrize("first", ["launcher", "buffer", "generator-0"])
def test_after_a_sleep_nobody_is_taken_for_frozen(start: Callable[..., Run], first: str) -> None:
    """Every process stands still for longer than a frozen one may, and they wake one after another."""
    run = start("trainer.steps=40")
    run.wait_for_training()
    everyone = [run.process.pid, *sorted(descendants(run.process.pid))]
    awake = run.process.pid if first == "launcher" else run.pid(first)
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * FROZEN_S)  # the sleep itself
    for pid in sorted(everyone, key=lambda pid: pid != awake):
        os.kill(pid, signal.SIGCONT)
        time.sleep(FROZEN_S / 12)
    said = run.said()
    assert run.process.returncode == 0, said
    assert not run.events() & (ALARMED - {"stall"})
    assert sum(1 for _ in read_rows(run.folder.metrics)) == 40
    assert json.loads(run.folder.summary.read_text())["steps"] == 40
    assert audit_run(run.folder).violations == ()
    assert run.left_behind() == []
