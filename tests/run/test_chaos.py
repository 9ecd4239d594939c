"""`async-rl chaos` as a user runs it: a short real run of which everything is killed; Ctrl-C; wrong settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import alive, descendants, wait_for, write_config

from async_rl.cli.chaos import sabotaged
from async_rl.cli.main import main
from async_rl.config import load_settings
from async_rl.run_folder import RunFolder, read_rows
from async_rl.weights.shared_memory import segment_path

LONGEST_S = 300.0


def begin(config: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "async_rl", "chaos", str(config), "--run-dir", str(run), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.nightly
def test_a_run_of_which_everything_is_killed_loses_nothing(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(
        tmp_path,
        tiny_model,
        "trainer.steps=120",
        "checkpoint.every=20",
        "evaluation.every=17",
        "wire.timeout_s=30",
        "wire.frozen_after_s=5",
    )
    run = RunFolder(tmp_path / "run")
    process = begin(config, run.path, "--kills", "4", "--seed", "3")
    said, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, said
    assert "Nothing was lost, nothing was trained twice, nothing hung." in said

    result = json.loads((run.path / "chaos.json").read_text())
    wanted = {
        "kills": 4, "freezes": 1, "slows": 1, "disconnects": 1, "groups_trained": 480, "groups_refused": 0, "lost": 0,
        "duplicated": 0, "hangs": 0, "replay_identical": True, "problems": [],
    }  # fmt: skip
    assert {name: result[name] for name in wanted} == wanted
    assert result["resumes"] >= 3  # buffer, trainer, launcher; a generator is started again by the launcher
    assert 0 <= result["lag_max"] <= 1
    assert result["max_stall_seconds"] > 0

    faults = list(read_rows(run.path / "chaos.jsonl"))
    assert {row["target"] for row in faults if row["fault"] == "kill"} == {
        "buffer", "trainer", "launcher", "generator-0"
    }  # fmt: skip
    assert all(row["followed"] and row["at_s"] > 0 for row in faults)
    assert run.settings().wire.connect == ""  # whoever goes on with it needs no proxy


@pytest.mark.nightly
def test_liars_that_join_are_quarantined_and_nothing_is_trained_on_them_then(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, "trainer.steps=900", "checkpoint.every=100", "evaluation.every=0",
        "wire.timeout_s=60", "verify.rewards=auto", "optimizer.warmup_steps=0",
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    words = ("--kills", "0", "--freezes", "0", "--slows", "0", "--disconnects", "0", "--lies", "3", "--seed", "4")
    process = begin(config, run.path, *words)
    said, _ = process.communicate(timeout=2 * LONGEST_S)
    assert process.returncode == 0, said
    result = json.loads((run.path / "chaos.json").read_text())
    wanted = {"lies": 3, "liars_quarantined": 3, "lies_trained_on": 0, "lost": 0, "duplicated": 0, "hangs": 0}
    assert {name: result[name] for name in wanted} == wanted, said
    assert result["replay_identical"]
    assert "lies trained on" in said


@pytest.mark.nightly
def test_code_of_the_task_that_does_what_it_must_not_and_full_disks_lose_nothing(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = write_config(
        tmp_path, tiny_model, "trainer.steps=300", "checkpoint.every=50", "wire.frozen_after_s=10",
        "task.args.num_secrets=16",
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    words = [word for name in ("kills", "freezes", "slows", "disconnects") for word in (f"--{name}", "0")]
    words += ["--raises", "2", "--cancels", "2", "--poisons", "1", "--disks", "2", "--seed", "1"]
    process = begin(config, run.path, *words)
    said, _ = process.communicate(timeout=2 * LONGEST_S)
    assert process.returncode == 0, said
    result = json.loads((run.path / "chaos.json").read_text())
    wanted = {"raises": 2, "cancels": 2, "poisons": 1, "disks": 2, "lost": 0, "duplicated": 0, "hangs": 0}
    assert {name: result[name] for name in wanted} == wanted, said
    assert result["replay_identical"]


def test_a_task_that_obeys_orders_keeps_its_settings(tmp_path: Path, tiny_model: Path) -> None:
    config, words = write_config(tmp_path, tiny_model), ["trainer.steps=3", "task.args.num_secrets=16"]
    weights = ["task.reward_weights={form: 0.5}"]
    asked = load_settings(config, [*words, *weights]).task
    made = load_settings(config, sabotaged([*words, *weights], asked, tmp_path))
    assert made.trainer.steps == 3
    assert made.task.args == {"name": asked.name, "args": asked.args, "orders": str(tmp_path)}
    assert made.task.reward_weights == asked.reward_weights == {"form": 0.5}
    plain = load_settings(config, sabotaged(words, load_settings(config, words).task, tmp_path))
    assert not plain.task.reward_weights


def test_ctrl_c_leaves_no_process_and_says_where_the_record_is(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=100000")
    run = RunFolder(tmp_path / "run")
    process = begin(config, run.path, "--kills", "0", "--freezes", "0", "--slows", "0", "--disconnects", "0")
    seen: set[int] = set()

    def training() -> bool:
        seen.update(descendants(process.pid))
        return run.metrics.exists() or process.poll() is not None

    wait_for(training, "the first step")
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 130, said
    assert f"stopped by SIGINT; everything is down, the record of the run is in {run.path}" in said
    assert "Traceback" not in said
    assert len(seen) >= 4
    assert [pid for pid in seen if alive(pid)] == []
    assert not segment_path(run.path).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kills", "-1"), "--kills is -1; it must be at least 0"),
        (("--kills", "1", "--freezes", "20000"), "--freezes is 20000; it must be at least 0 and at most 10,000"),
        (("trainer.step=3",), "did you mean 'trainer.steps'?"),
        (("wire.connect=here",), "wire.connect is 'here'; it must look like ipc://PATH"),
        (("--disconnects", "1", "wire.connect=ipc://x"), "disconnects need it: leave it out, or say --disconnects 0"),
        (("--disconnects", "1", "wire.endpoint=tcp://127.0.0.1:*", "wire.keys=k"), "are cut on Unix sockets only"),
        (("model.path=nowhere",), "model folder nowhere does not exist"),
    ],
)
def test_wrong_settings_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path, words: tuple[str, ...], message: str
) -> None:
    config = write_config(tmp_path, tiny_model)
    assert message in refused(capsys, str(config), *words, "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_not_hurt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    config = write_config(tmp_path, tiny_model)
    assert "exists already; choose another --run-dir" in refused(capsys, str(config), "--run-dir", str(tmp_path))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["chaos", *words])
    assert end.value.code == 2
    return capsys.readouterr().err
