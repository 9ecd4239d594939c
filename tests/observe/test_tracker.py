"""Metrics reach the trackers once each, over resumes too, and a tracker that breaks hurts nothing."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support_run import quick_settings, train
from support_story import Story
from support_wandb import history

from async_rl.errors import UserError
from async_rl.observe.tracker import Delivered, Series, Tracker, open_tracker
from async_rl.run.launcher import TrackerProcess
from async_rl.run_folder import RunFolder, read_rows


def at_once(_: float) -> bool:
    """The run has ended."""
    return True


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every series, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def cut(folder: RunFolder, version: int) -> None:
    """As a launch that resumes at `version` rewinds the files."""
    for path, keep in ((folder.metrics, "step"), (folder.events, "evaluation")):
        rows = [r for r in read_rows(path) if keep not in r or r["step"] < version]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(folder: Path, key: str, rows: int) -> list[tuple[int, float]]:
    """(step, value) that W&B wrote, in its order. Its own process may still be writing when a run is finished:
    waits for so many rows, a minute at most."""
    deadline = time.monotonic() + 60
    while True:
        found = [(row["step"], row[key]) for row in history(folder) if key in row]
        if len(found) >= rows or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_run_goes_to_both_trackers(tmp_path: Path, tiny_model: Path, offline: None) -> None:
    pytest.importorskip("tensorboard")
    folder = train(quick_settings(tiny_model, "trackers=[tensorboard,wandb]"), tmp_path / "run")
    rows = list(read_rows(folder.metrics))
    shown = board(folder.path)
    assert [step for step, _ in shown["reward/mean"]] == [0, 1, 2, 3]
    for key, value in rows[2].items():
        if key not in ("step", "time"):
            assert dict(shown[key])[2] == pytest.approx(value, rel=1e-5), key
    held_out = {e["step"]: e["reward"] for e in read_rows(folder.events) if e["event"] == "evaluation"}
    assert dict(shown["reward/eval"]) == pytest.approx(held_out)
    assert logged(folder.path, "reward/mean", 4) == [(row["step"], row["reward/mean"]) for row in rows]
    assert dict(logged(folder.path, "reward/eval", 2)) == held_out
    assert not [e for e in read_rows(folder.events) if e["event"] == "tracker_failed"]


def test_tensorboard_shows_a_step_that_was_trained_again_as_it_was_trained_last(
    tmp_path: Path, tiny_model: Path
) -> None:
    pytest.importorskip("tensorboard")
    story = Story(path=tmp_path / "run", model=tiny_model, steps=30)
    folder = story.write(summary=False)
    open_tracker(folder, ["tensorboard"], 0).follow(at_once)
    assert len(board(folder.path)["entropy"]) == 30
    cut(folder, 20)
    later = Story(path=tmp_path / "later", model=tiny_model, steps=40, seed=5)
    with folder.metrics.open("a") as file:
        file.write("".join(json.dumps(later.row(step)) + "\n" for step in range(20, 40)))
    with folder.events.open("a") as file:
        file.write("".join(json.dumps(e) + "\n" for e in later.events() if e.get("step", 0) >= 20))
    open_tracker(folder, ["tensorboard"], 20).follow(at_once)
    shown = board(folder.path)
    assert [step for step, _ in shown["ess/ratio"]] == list(range(40))
    expected = [(story if step < 20 else later).row(step)["ess/ratio"] for step in range(40)]
    assert [value for _, value in shown["ess/ratio"]] == pytest.approx(expected)
    assert [step for step, _ in shown["reward/eval"]] == [0, 10, 20, 30, 40]


def test_wandb_goes_on_with_the_same_run_and_doubles_nothing(tmp_path: Path, tiny_model: Path, offline: None) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=30)
    folder = story.write(summary=False)
    open_tracker(folder, ["wandb"], 0).follow(at_once)
    identity = json.loads((folder.path / "trackers.json").read_text())["wandb"]["identity"]
    with folder.metrics.open("a") as file:
        file.write("".join(json.dumps(story.row(step)) + "\n" for step in range(30, 35)))
    time.sleep(1.0 - time.time() % 1.0)  # W&B names the files of a launch by the second
    open_tracker(folder, ["wandb"], 20).follow(at_once)
    assert [step for step, _ in logged(folder.path, "entropy", 35)] == list(range(35))
    assert sorted(step for step, _ in logged(folder.path, "reward/eval", 4)) == [0, 10, 20, 30]
    assert json.loads((folder.path / "trackers.json").read_text())["wandb"]["identity"] == identity


class Remembers:
    """A writer that keeps what it is given, and breaks at a step."""

    def __init__(self, *, breaks_at: int = 10**9, takes_back: bool = False) -> None:
        self.takes_back, self.breaks_at = takes_back, breaks_at
        self.given: dict[int, dict[str, float]] = defaultdict(dict)
        self.closed = False

    def write(self, step: int, at: float, values: Mapping[str, float]) -> None:
        if step >= self.breaks_at:
            raise ConnectionError("no network")
        assert not self.given[step].keys() & values.keys(), "sent twice"
        self.given[step] |= values

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_breaks_is_told_of_once_and_the_others_go_on(tmp_path: Path, tiny_model: Path) -> None:
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=30).write()
    broken, whole = Remembers(breaks_at=7), Remembers()
    Tracker(folder, [Series("broken", broken, Delivered()), Series("whole", whole, Delivered())]).follow(at_once)
    assert sorted(whole.given) == list(range(31))
    assert whole.closed
    told = [e for e in read_rows(folder.events) if e["event"] == "tracker_failed"]
    assert [(e["name"], e["reason"]) for e in told] == [("broken", "ConnectionError: no network")]


def test_rows_are_sent_as_they_come_and_none_twice(tmp_path: Path, tiny_model: Path) -> None:
    story = Story(path=tmp_path / "run", model=tiny_model, steps=10)
    folder = story.write()
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text("")
    writer, turn = Remembers(), iter(range(5))

    def over(_: float) -> bool:
        now = next(turn)
        with folder.metrics.open("a") as file:
            file.write("".join(lines[2 * now : 2 * now + 2]))
        return now == 4

    tracker = Tracker(folder, [Series("one", writer, Delivered())])
    tracker.follow(over)
    assert [step for step in sorted(writer.given) if "entropy" in writer.given[step]] == list(range(10))


def test_a_tracker_that_cannot_be_opened_is_told_of(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=2).write()
    (folder.path / "tensorboard").write_text("in the way")
    assert open_tracker(folder, ["tensorboard"], 0).series == []
    (told,) = [e for e in read_rows(folder.events) if e["event"] == "tracker_failed"]
    assert told["name"] == "tensorboard"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[tensorbord]", "trackers: 'tensorbord' is none; did you mean 'tensorboard'"),
        ("[wandb,wandb]", "trackers names wandb twice"),
        ("wandb", r"trackers is 'wandb'; it must be a list, e.g. trackers=\[wandb\]"),
    ],
)
def test_a_wrong_tracker_is_refused_at_load(value: str, complaint: str, tiny_model: Path) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match=complaint):
        quick_settings(tiny_model, f"trackers={value}")


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_to_install_it(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # W&B leaves such a folder where it ran: no package
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install wandb"):
        quick_settings(tiny_model, "trackers=[wandb]")


def test_a_tracker_process_that_is_killed_is_told_of_and_hurts_nothing(
    tmp_path: Path, tiny_model: Path, poll: Callable[[Callable[[], object]], None]
) -> None:
    pytest.importorskip("tensorboard")
    folder = Story(path=tmp_path / "run", model=tiny_model, steps=3).write()
    reads, writes = os.pipe()
    tracking = TrackerProcess(folder)
    tracking.start(["tensorboard"], 0, parent_pipe=reads, lock=reads)
    process: Any = tracking.process
    poll(lambda: any(e["event"] == "tracker_ready" for e in read_rows(folder.events)))
    process.kill()
    process.wait()
    for _ in range(3):
        tracking.poll()
    os.close(writes)
    os.close(reads)
    tracking.finish()
    (told,) = [e for e in read_rows(folder.events) if e["event"] == "tracker_failed"]
    assert "killed from outside (SIGKILL)" in told["reason"]


@pytest.fixture
def poll() -> Callable[[Callable[[], object]], None]:
    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return until
