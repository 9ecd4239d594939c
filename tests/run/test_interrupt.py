"""Ctrl-C, orders to end, killed processes and failing rewards, on real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import Run, alive, starter, wait_for, write_config

from async_rl.run_folder import RunFolder, read_rows
from async_rl.weights.shared_memory import segment_path

SOON_S = 5.0
REWARDS = """
calls = 0

def now_and_then(completion, answer, problem):
    global calls
    calls += 1
    if calls % 5 == 0:
        raise KeyError("gold")
    return float("nan") if calls % 7 == 0 else float(len(completion) % 2)

def never(completion, answer, problem):
    raise ValueError("no answer sheet")
"""


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Run]:
    return starter(tmp_path, tiny_model, "trainer.steps=100000")


def test_on_ctrl_c_generators_hand_over_what_is_done_before_the_buffer_ends(start: Callable[..., Run]) -> None:
    run = start("generator.count=2")
    run.wait_for_training()
    run.wait_for(lambda: len(run.folder.metrics.read_text().splitlines()) >= 3, "three steps")
    run.press_ctrl_c()
    run.said()
    assert run.process.returncode == 130
    left = {row["name"] for row in read_rows(run.folder.events) if row["event"] == "generator_left"}
    assert left == {"generator-0", "generator-1"}


@pytest.mark.parametrize(
    "moment",
    [
        "started",  # imports begin
        pytest.param("trainer_ready", marks=pytest.mark.nightly),  # the first evaluation begins
    ],
)
def test_ctrl_c_ends_everything_soon(start: Callable[..., Run], moment: str) -> None:
    run = start()
    run.wait_for_event(moment)
    pressed = time.monotonic()
    run.press_ctrl_c()
    said = run.said()
    assert time.monotonic() - pressed < SOON_S
    assert run.process.returncode == 130
    assert f"stopped by SIGINT; everything is down, the record of the run is in {run.folder.path}" in said
    assert "Traceback" not in said
    assert run.left_behind() == []


@pytest.mark.nightly
def test_an_order_to_end_followed_by_impatience_leaves_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_for_training()
    run.process.terminate()
    while run.process.poll() is None:  # as fast as they come
        run.press_ctrl_c()
    said = run.said()
    assert run.process.returncode in (130, 143)  # whichever signal it saw first
    assert "stopped by SIG" in said
    assert "Traceback" not in said
    assert run.left_behind() == []
    assert "interrupted" in run.events()


@pytest.mark.parametrize("name", ["buffer", pytest.param("trainer", marks=pytest.mark.nightly)])
def test_a_process_killed_from_outside_ends_the_run_with_its_name(start: Callable[..., Run], name: str) -> None:
    run = start()
    run.wait_for_training()
    os.kill(run.pid(name), signal.SIGKILL)
    said = run.said()
    assert run.process.returncode == 1
    assert f"async-rl: {name} was killed from outside (SIGKILL)" in said
    assert "Traceback" not in said
    assert run.left_behind() == []


@pytest.mark.nightly
def test_children_of_a_killed_launcher_end_and_what_it_left_stops_no_later_run(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    endpoint = f"wire.endpoint=ipc://{tmp_path}/b.sock"
    run = start(endpoint)
    run.wait_for_training()
    # Trainer and buffer cannot clean up either, as when the machine runs out of memory.
    for pid in (run.process.pid, run.pid("trainer"), run.pid("buffer")):
        os.kill(pid, signal.SIGKILL)
    run.said()
    wait_for(lambda: not any(alive(pid) for pid in run.seen), "the generator to notice")
    assert segment_path(run.folder.path).exists()
    assert (tmp_path / "b.sock").exists()
    shutil.rmtree(run.folder.path)

    again = start(endpoint, "trainer.steps=2")
    said = again.said()
    assert again.process.returncode == 0, said
    assert again.left_behind() == []
    assert not (tmp_path / "b.sock").exists()
    assert [row["step"] for row in read_rows(again.folder.metrics)] == [0, 1]
    assert "generator_died" not in again.events()


def test_a_reader_that_goes_away_is_no_failure_of_the_run(tmp_path: Path, tiny_model: Path) -> None:
    """As in `async-rl run ... | head -1`."""
    config = write_config(tmp_path, tiny_model, "trainer.steps=10")
    command = [sys.executable, "-m", "async_rl", "run", str(config), "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("run ")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0
    check_finished(RunFolder(tmp_path / "run"), "its reader has gone")


@pytest.mark.nightly
def test_an_output_that_is_full_is_no_failure_of_the_run(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=5")
    command = [sys.executable, "-m", "async_rl", "run", str(config), "--run-dir", str(tmp_path / "run")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    check_finished(RunFolder(tmp_path / "run"), "No space left on device")


def check_finished(folder: RunFolder, lost: str) -> None:
    assert folder.summary.exists()
    assert [row["reason"] for row in read_rows(folder.events) if row["event"] == "output_lost"] == [lost]
    assert not segment_path(folder.path).exists()


# ------------------------------------------------------------------------------------------- rewards


def dataset(tmp_path: Path, reward: str) -> list[str]:
    (tmp_path / "interrupted_rewards.py").write_text(REWARDS)
    rows = [json.dumps({"prompt": f"{i}<", "answer": f"{i}"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    args = {"path": tmp_path / "rows.jsonl", "as_chat": "false", "max_tokens": 3, "eval_share": 0.3, "reward": reward}
    return ["task=dataset", *(f"task.args.{name}={value}" for name, value in args.items())]


def python_path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def reasons(folder: RunFolder) -> dict[str, int]:
    with sqlite3.connect(folder.store) as store:
        return dict(store.execute("SELECT reason, count(*) FROM trajectories WHERE ended = 'error' GROUP BY 1"))


def test_a_reward_that_fails_now_and_then_ends_its_trajectories_only(start: Callable[..., Run], tmp_path: Path) -> None:
    words = dataset(tmp_path, "interrupted_rewards:now_and_then")
    run = start(*words, "trainer.steps=6", PYTHONPATH=python_path(tmp_path))
    said = run.said()
    assert run.process.returncode == 0, said
    assert set(reasons(run.folder)) == {
        "RewardError: reward 'interrupted_rewards:now_and_then' raised KeyError: 'gold' "
        "(interrupted_rewards.py:8 now_and_then)",
        "RewardError: reward 'interrupted_rewards:now_and_then' returned nan",
    }
    assert json.loads(run.folder.summary.read_text())["trajectories_failed"] > 0


@pytest.mark.nightly
def test_too_many_failures_in_a_row_end_the_run_with_the_reason(start: Callable[..., Run], tmp_path: Path) -> None:
    words = dataset(tmp_path, "interrupted_rewards:never")
    run = start(*words, "buffer.max_failures=8", PYTHONPATH=python_path(tmp_path))
    said = run.said()
    raised = "RewardError: reward 'interrupted_rewards:never' raised ValueError: no answer sheet"
    reason = f"{raised} (interrupted_rewards.py:12 never)"
    assert run.process.returncode == 1
    assert f"trajectories in a row failed; the last one: {reason}" in said
    assert "generator-0 died" not in said
    assert list(reasons(run.folder)) == [reason]
    assert run.left_behind() == []
