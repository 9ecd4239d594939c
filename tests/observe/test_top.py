"""A run at a glance: finished, going on, broken; in wide, narrow and no terminals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support_story import REFUSED, Story

from async_rl.errors import UserError
from async_rl.events import AlarmRaised, GeneratorDied, RunRolledBack
from async_rl.observe import top as top_module
from async_rl.observe.top import BLOCKS, RunPoller, render, sparkline, top
from async_rl.process import Interrupted
from async_rl.run_folder import RowTail, RunFolder, append_row


def printed(run: Path, width: int = 130, *, terminal: bool = False) -> str:
    out = io.StringIO()
    top(run, once=True, console=Console(file=out, width=width, force_terminal=terminal, highlight=False))
    return out.getvalue()


def make_live(folder: RunFolder, **changes: Any) -> None:
    """As the launcher of a run that goes on leaves its folder."""
    folder.lock.write_text(f"{os.getpid()}\n")
    row = {"pid": 1, "doing": "training step 19", "since_s": 0.3, "silent_s": 0.1}
    processes = [
        {"name": "trainer", "role": "trainer", **row},
        {"name": "generator-0", "role": "generator", **row, "doing": "decoding [red]", "silent_s": 12.5, "version": 17},
    ]
    wait = {"who": "trainer", "what": "the batch of step 20", "seconds": 42.0, "why": "3 of 4 groups finished"}
    values = {"time": 1e12, "state": "running", "steps": 40, "step": 20, "published": 20, "processes": processes}
    values |= {"waits": [wait], "slots": {"used": 5, "all": 8}}
    (folder.path / "live.json").write_text(json.dumps(values | changes))


def test_a_finished_run_is_printed_once(tmp_path: Path, tiny_model: Path) -> None:
    text = printed(Story(path=tmp_path / "run", model=tiny_model, steps=20, lag=3).write().path)
    assert "finished: 20 of 20 steps" in text
    assert "0.00095 = 0.001 x ESS 0.950 x κ 1.000" in text
    assert "7 of 8" in text
    assert "step 19" in text


def test_a_run_that_goes_on_shows_processes_and_who_waits_for_whom(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=20).write(summary=False)
    make_live(folder)
    died = GeneratorDied(name="generator-1", reason="killed", restart_in_s=0.5, deaths=1, max_restarts=3)
    folder.record(died, time=1.0)
    text = printed(folder.path)
    assert "20 of 20 steps so far" in text
    assert "trainer for the batch of step 20, 42 s" in text
    assert "3 of 4 groups finished" in text
    assert "decoding [red]" in text, "what a process says is text, no markup"
    assert "12 s ago" in text
    assert "5 of 8" in text
    assert "generator died generator-1" in text


def test_staleness_is_split_into_flight_and_queue(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=20, lag=3)
    glance = RunPoller(story.write().path).poll()
    each = story.groups * story.size
    assert glance.in_flight == {0: each, 1: 19 * each}
    assert glance.in_queue == {0: 2 * each, 1: each, 2: 17 * each}
    assert len(glance.samples) == 6
    assert {sample.reward for sample in glance.samples} <= {0.0, 1.0}
    assert 20 // REFUSED > 0


@pytest.mark.parametrize("width", [20, 40, 79, 80, 118, 200])
def test_no_line_is_wider_than_the_terminal(width: int, tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=20).write(summary=False)
    make_live(folder)
    lines = printed(folder.path, width).splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= width


def test_a_run_that_has_just_begun_or_lost_its_files_is_shown(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write(summary=False)
    for file in (folder.metrics, folder.events, folder.store):
        file.unlink()
    assert "no step was trained yet" in printed(folder.path)
    folder.store.write_bytes(b"not a database at all" * 100)
    (folder.path / "live.json").write_text("{torn")
    assert "broke off" in printed(folder.path)
    with pytest.raises(UserError, match="is not a run folder"):
        printed(tmp_path)


def test_in_a_terminal_it_is_drawn_until_the_run_ends(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=5).write(summary=False)
    make_live(folder)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            folder.lock.unlink()

    monkeypatch.setattr(top_module.time, "sleep", sleep)
    out = io.StringIO()
    top(folder.path, once=False, console=Console(file=out, width=100, height=40, force_terminal=True))
    assert len(slept) == 3
    assert "broke off after 5 of 5 steps" in out.getvalue()


def test_ctrl_c_leaves_and_shows_the_run_a_last_time(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=5).write(summary=False)
    make_live(folder)

    def interrupt(_: float) -> None:
        raise Interrupted("SIGINT")

    monkeypatch.setattr(top_module.time, "sleep", interrupt)
    out = io.StringIO()
    top(folder.path, once=False, console=Console(file=out, width=100, height=40, force_terminal=True))
    assert "\x1b[?1049l" in out.getvalue(), "the screen from before is back"


def test_into_a_pipe_a_running_run_is_printed_once(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=5).write(summary=False)
    make_live(folder)
    command = [sys.executable, "-m", "async_rl", "top", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stdout
    assert "\x1b" not in done.stdout


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50), st.integers(1, 30))
def test_a_sparkline_fits_and_uses_the_whole_height(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) <= width
    assert set(line) <= set(BLOCKS)


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([1, 1, 1], 8) == BLOCKS[0] * 3
    assert sparkline([], 8) == ""


def test_rows_are_followed_over_torn_lines_and_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    follow = RowTail(path)
    assert follow.poll() == ([], False)
    append_row(path, {"step": 0})
    assert follow.poll() == ([{"step": 0}], True)
    with path.open("a") as file:
        file.write('{"step"')
        file.flush()
        assert follow.poll() == ([], False)
        file.write(": 1}\nnonsense\n")
    assert follow.poll() == ([{"step": 1}], False)
    rewritten = tmp_path / "new.jsonl"
    rewritten.write_text('{"step": 0}\n')
    rewritten.rename(path)
    assert follow.poll() == ([{"step": 0}], True)


def test_a_resumed_run_loses_the_rows_that_are_trained_again(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=6).write(summary=False)
    poller = RunPoller(folder.path)
    assert len(poller.poll().record.rows) == 6
    lines = folder.metrics.read_text().splitlines(keepends=True)
    rewritten = tmp_path / "metrics"
    rewritten.write_text("".join(lines[:2]))
    rewritten.rename(folder.metrics)
    glance = poller.poll()
    assert [row["step"] for row in glance.record.rows] == [0, 1]
    drawn: Callable[..., object] = render
    assert drawn(glance, 100, 0.0) is not None


def with_alarms(folder: RunFolder) -> RunFolder:
    """An alarm, the return, and another alarm."""
    first, second = "ess/ratio 0.03, below 0.05, over steps 0 to 9", "ess/ratio 0.02, below 0.05, over steps 6 to 15"
    back = RunRolledBack(
        version=10, to=4, since=4, lr_scale=1.0, reason=first, text="at step 9 to the checkpoint of version 4"
    )
    folder.record(AlarmRaised(signal="ess", since=4, step=9, reason=first), time=1.7e9 + 8)
    folder.record(back, time=1.7e9 + 9)
    folder.record(AlarmRaised(signal="ess", since=4, step=15, reason=second), time=1.7e9 + 8)
    return folder


def test_alarms_stand_at_the_top(tmp_path: Path, tiny_model: Path) -> None:
    text = " ".join(printed(with_alarms(Story(path=tmp_path / "run", model=tiny_model, steps=20).write()).path).split())
    assert "ALARM at step 15, ess: ess/ratio 0.02" in text
    assert "ALARM at step 9" not in text  # until the run went back
    assert "it went back at step 9 to the checkpoint of version 4" in text
