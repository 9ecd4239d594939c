"""A run that has no room left ends with the cause and goes on when there is some; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import Run, write_config
from support_run import quick_settings, train

from async_rl.buffer.store import StoreReader
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.replay import describe_replay, replay
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training
from async_rl.run.preflight import check_message_size, preflight
from async_rl.run_folder import RowTail, RunFolder, append_row, read_rows

SMALL = (
    *("batch.groups_per_step=16", "batch.group_size=8", "trainer.steps=24"),
    *("checkpoint.every=2", "checkpoint.keep=2"),
)


def test_a_run_ends_at_its_store_limit_and_goes_on_when_it_is_raised(tiny_model: Path, tmp_path: Path) -> None:
    settings = quick_settings(tiny_model, *SMALL, "buffer.max_store_mb=1")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunFailed, match=r"^buffer: .*trajectories\.sqlite: .*may hold 1 MB \(buffer\.max_store_mb\)"):
        train(settings, folder.path)
    assert not folder.summary.exists()
    trained = len(list(read_rows(folder.metrics)))
    assert 2 <= trained < 24, "so that there is something to go on with"
    words = ["buffer.max_store_mb=0", f"trainer.steps={trained + 2}"]
    summary = resume_training(folder.path, words, console=Console(quiet=True))
    assert summary["steps"] == trained + 2
    with StoreReader(folder.store) as store:
        assert store._all("PRAGMA integrity_check") == [("ok",)]
        groups = [group for batch in store.batches() for group in batch.groups]
        assert len(groups) == len(set(groups)) == 16 * (trained + 2)
    assert replay(folder).difference is None


def test_a_run_that_keeps_its_newest_steps_stays_below_that_limit_and_replays_from_a_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = quick_settings(tiny_model, *SMALL, "buffer.max_store_mb=1", "buffer.keep_steps=2")
    folder = train(settings, tmp_path / "run")
    with StoreReader(folder.store) as store:
        first = store.first_step()
        assert 8 < first <= 22
        assert len(list(store.trajectories(split="train"))) >= 24 * 128
    result = replay(folder)
    assert (result.begun, result.version, result.difference) == (22, 24, None)
    assert "from the checkpoint of version 22 on" in describe_replay(result, folder)
    with pytest.raises(UserError, match=r"begin with a checkpoint of version \d+ to 21; whole checkpoints: 22, 24"):
        replay(folder, until=21)
    (folder.checkpoints / "step_000024" / "model.safetensors").unlink()
    (folder.checkpoints / "step_000022" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint from which the run could go on: .*buffer\.keep_steps"):
        resume_training(folder.path, ["trainer.steps=30"], console=Console(quiet=True))


def test_files_that_may_not_grow_end_a_run_without_a_traceback(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, *SMALL)
    command = f"ulimit -f 300; exec '{sys.executable}' -m async_rl run '{config}' --run-dir '{tmp_path}/run' --quiet"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "disk I/O error; is the disk full, or a limit on file sizes reached" in done.stderr
    assert "`async-rl run --resume" in done.stderr
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").glob("*.log"))
    assert "Traceback" not in done.stderr + logs
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_row_that_cannot_be_written_names_its_file() -> None:
    with pytest.raises(RunFailed, match=r"^/dev/full cannot be written \(No space left on device\); make room"):
        append_row(Path("/dev/full"), {"step": 1})


def test_a_row_that_a_full_disk_tore_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "rew\n{"step": 2}\n{"step": 3')
    assert [row["step"] for row in read_rows(path)] == [0, 2]
    tail = RowTail(path)
    assert [row["step"] for row in tail.new()] == [0, 2]
    other = RowTail(path)
    other.skip()
    assert other.new() == []


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("RunFailed('no room')", "no room"),
        ("OSError(28, 'No space left on device', 'x.json')", "[Errno 28] No space left on device: 'x.json'; is its"),
    ],
)
def test_a_process_that_can_write_nowhere_still_says_why_it_ended(tmp_path: Path, raised: str, said: str) -> None:
    """Its folder is not there, its output is a full device."""
    ours, theirs = os.pipe()
    script = (
        "from async_rl.errors import RunFailed\nfrom async_rl.process import run_process\n"
        "from async_rl.process_spec import Pipes, ProcessSpec\n"
        f"def work():\n    raise {raised}\n"
        f"spec = ProcessSpec(run={str(tmp_path / 'none')!r}, name='trainer', pipes=Pipes(cause={theirs}))\n"
        "run_process(spec, work)"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=full, pass_fds=(theirs,), check=False, timeout=60,
        )  # fmt: skip
    os.close(theirs)
    cause = json.loads(os.read(ours, 1 << 16))
    os.close(ours)
    assert done.returncode == 1
    assert cause["kind"] == "run"
    assert cause["message"].startswith(said)


def test_a_context_that_no_message_can_carry_is_refused_before_the_start(tiny_model: Path) -> None:
    preflight(quick_settings(tiny_model, "wire.max_message_mb=1"))
    check_message_size(100_000, 1)
    with pytest.raises(UserError, match=r"max_message_mb is 1, .* 200000 tokens \(the context\) takes up to 2 MB"):
        check_message_size(200_000, 1)


def test_retention_that_would_do_nothing_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"buffer\.keep_steps deletes nothing .* set checkpoint\.every"):
        quick_settings(tiny_model, "buffer.keep_steps=3", "checkpoint.every=0")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_folder_and_it_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=12", "checkpoint.every=8", "wire.timeout_s=30")
    run = Run(config, RunFolder(tmp_path / "run"))
    run.wait_for(run.folder.checkpoints.is_dir, "the folder of checkpoints")
    in_the_way = run.folder.checkpoints / ".step_000008.partial"
    in_the_way.write_text("")  # root may write anywhere, but not make a folder where a file is
    said = run.said()
    assert run.process.returncode == 1
    assert f"the checkpoint of version 8 cannot be written to {run.folder.checkpoints} (File exists)" in said
    assert "Traceback" not in said
    assert not run.folder.summary.exists()
    assert run.left_behind() == []
    in_the_way.unlink()
    assert resume_training(run.folder.path, [], console=Console(quiet=True))["steps"] == 12
