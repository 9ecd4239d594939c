"""A run that has no room left ends with the cause and goes on when there is some; nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support_command import Run, run_command, write_config
from support_run import quick_settings, train

from async_rl.buffer.store import StoreReader
from async_rl.config.sources import read_sources
from async_rl.errors import RunFailed, UserError
from async_rl.instruments.replay import describe_replay, replay
from async_rl.observe.audit import audit_run
from async_rl.observe.console import Console
from async_rl.run.inputs import read_inputs
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


@pytest.mark.nightly
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


# ------------------------------------------------------------------------------------- a disk that really is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many kB, grown by a second call. Only root may make one."""
    at = tmp_path / "disk"

    def sized(kilobytes: int) -> Path:
        mounted = at.is_mount()
        at.mkdir(exist_ok=True)
        words = ["-o", f"{'remount,' * mounted}size={kilobytes}k", *(() if mounted else ("-t", "tmpfs", "tmpfs")), at]
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return at

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield sized
    if at.is_mount():
        subprocess.run(["umount", "-l", at], check=False)


def ends_well_when_there_is_room(folder: RunFolder, said: str, code: int) -> None:
    """Of a run whose disk was full: it said so in one line, and what it wrote is whole or not there."""
    logs = "".join(path.read_text() for path in folder.logs.glob("*.log")) if folder.logs.exists() else ""
    assert "Traceback" not in said + logs
    assert "No space left on device" in said or "disk is full" in said or "disk I/O error" in said
    for path in folder.path.rglob("*.json"):
        if ".partial" not in str(path) and path.parent != folder.failure("trainer").parent:
            json.loads(path.read_text())  # none was cut
    if code == 2:
        assert not folder.path.exists(), "a run that never began leaves nothing"
        return
    assert code == 1
    assert "`async-rl run --resume" in said
    assert resume_training(folder.path, [], console=Console(quiet=True))["steps"] == 8
    assert audit_run(folder).violations == ()
    assert replay(folder).difference is None


SIZES = (12, 40)
MORE_SIZES = (2, 16, 24, 60, 100, 160, 220, 300, 450, 600, 800, 1200, 2000, 3000)


@pytest.mark.parametrize("kilobytes", [*SIZES, *(pytest.param(n, marks=pytest.mark.nightly) for n in MORE_SIZES)])
def test_wherever_a_disk_is_full_the_run_says_so_and_goes_on_when_there_is_room(
    tiny_model: Path, tmp_path: Path, disk: Callable[[int], Path], kilobytes: int
) -> None:
    """The sizes end a run at its folder, its sources, its events, its store, its checkpoints."""
    folder = RunFolder(disk(kilobytes) / "run")
    config = write_config(tmp_path, tiny_model, "trainer.steps=8", "checkpoint.every=2", "checkpoint.keep=2")
    run = Run(config, folder)
    said = run.said()
    disk(64 << 10)
    if kilobytes >= 2000 and run.process.returncode == 0:
        return  # there was room
    ends_well_when_there_is_room(folder, said, run.process.returncode)


@pytest.mark.nightly
def test_a_disk_that_fills_up_in_the_middle_of_a_run(
    tiny_model: Path, tmp_path: Path, disk: Callable[[int], Path]
) -> None:
    folder = RunFolder(disk(16 << 10) / "run")
    config = write_config(tmp_path, tiny_model, "trainer.steps=8", "checkpoint.every=2", "checkpoint.keep=2")
    run = Run(config, folder)
    run.wait_for(lambda: list(folder.checkpoints.glob("step_*")), "a checkpoint")
    ballast = folder.path.parent / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 12))
            file.flush()
    said = run.said()
    ballast.unlink()
    ends_well_when_there_is_room(folder, said, run.process.returncode)


@pytest.mark.nightly
def test_files_and_pages_for_people_say_that_the_disk_is_full_and_leave_no_rest(
    tiny_model: Path, tmp_path: Path, disk: Callable[[int], Path]
) -> None:
    folder = train(quick_settings(tiny_model, "trainer.steps=2"), tmp_path / "run")
    full = disk(4)
    (full / "ballast").write_bytes(bytes(4096))
    for words in (("report", folder.path, "--out", full / "r.html"), ("trace", folder.path, "--out", full / "t.json")):
        done = run_command(*words)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"async-rl: {words[-1]} cannot be written (No space left on device); choose another --out"
        ]
    assert [path.name for path in full.iterdir()] == ["ballast"]


def test_a_record_that_was_cut_short_is_named_with_its_remedy(tmp_path: Path) -> None:
    """Versions up to 0.3.0 wrote them in place, so a full disk left them empty."""
    for name, read in (("sources.json", read_sources), ("inputs.json", read_inputs)):
        path = tmp_path / name
        for text in ("", '[{"setting": "model.pa', "3"):
            path.write_text(text)
            with pytest.raises(UserError, match=f"{name}.* damaged; remove"):
                read(path)


# ------------------------------------------------------------------------------------------------ few open files


@pytest.mark.nightly
@pytest.mark.parametrize(("limit", "code"), [(64, 0), (24, None)])
def test_few_open_files_are_enough_or_are_named(tiny_model: Path, tmp_path: Path, limit: int, code: int | None) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=8", "checkpoint.every=2", "generator.count=2")
    command = f"ulimit -n {limit}; exec '{sys.executable}' -m async_rl run '{config}' --run-dir '{tmp_path}/run'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "logs").glob("*.log"))
    if code == 0:
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr + logs
        return
    assert done.returncode in (1, 2)
    assert "Too many open files" in done.stderr + done.stdout
    assert "make room on its disk" not in done.stderr + done.stdout


def test_a_row_that_finds_no_descriptor_names_the_limit(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 1, limits[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(held))
        with pytest.raises(RunFailed, match=r"\(Too many open files\); raise the limit of open files \(ulimit -n\)"):
            append_row(tmp_path / "events.jsonl", {"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in [held, *taken]:
            os.close(descriptor)


def test_a_context_that_no_message_can_carry_is_refused_before_the_start(tiny_model: Path) -> None:
    preflight(quick_settings(tiny_model, "wire.max_message_mb=1"))
    check_message_size(100_000, 1)
    with pytest.raises(UserError, match=r"max_message_mb is 1, .* 200000 tokens \(the context\) takes up to 2 MB"):
        check_message_size(200_000, 1)


def test_retention_that_would_do_nothing_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"buffer\.keep_steps deletes nothing .* set checkpoint\.every"):
        quick_settings(tiny_model, "buffer.keep_steps=3", "checkpoint.every=0")


@pytest.mark.nightly
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
