"""A checkpoint is finished beside training, counts when its sums are on the disk, and not before."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support_run import quick_settings
from support_steps import episodes

from async_rl.trainer import manifest
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import delete_old, load_checkpoint, save_checkpoint, write_checkpoint
from async_rl.trainer.learner import Learner
from async_rl.trainer.manifest import damage_of, list_checkpoints, newest_whole, version_of
from async_rl.trainer.packing import pack_step
from async_rl.trainer.saving import Saving
from async_rl.trainer.team import Team, weights_hash


def begun(folder: Path, learner: Learner, source: Path, told: list[str]) -> Saving:
    partial = write_checkpoint(folder, learner, {}, source=source, team=Team(learner.ranks))
    return Saving(
        partial=partial,
        version=learner.version,
        stood_still_s=0.0,
        weights=list(learner.full_weights()),
        record_hash=told.append,
        tidy=lambda: delete_old(folder, keep=1, spared=None),
    ).begin()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before this is set."""
    ready, real = threading.Event(), manifest.to_disk

    def slow(path: Path) -> None:
        assert ready.wait(60)
        real(path)

    monkeypatch.setattr(manifest, "to_disk", slow)
    return ready


def test_training_goes_on_while_a_checkpoint_is_finished_which_holds_the_version_before(
    tmp_path: Path, tiny_model: Path, disk: threading.Event
) -> None:
    settings = quick_settings(tiny_model, "recipe=vcpo", "trainer.steps=9")
    learner, told = make_learner(settings), []
    folder = tmp_path / "checkpoints"
    disk.set()
    learner.step(pack_step(settings, episodes(0)))
    save_checkpoint(folder, learner, {}, source=tiny_model, keep=1)
    learner.step(pack_step(settings, episodes(1)))
    disk.clear()
    expected = weights_hash(learner.weights())
    saving = begun(folder, learner, tiny_model, told)
    learner.before_write = saving.before_write
    learner.step(pack_step(settings, episodes(2)))
    later = learner.step(pack_step(settings, episodes(3))).metrics
    assert told == [expected], "the hash of the version, although training went on"
    assert not saving.is_done
    assert [version_of(path) for path in list_checkpoints(folder)] == [1], "it does not count yet"
    disk.set()
    saving.wait()
    (path,) = list_checkpoints(folder)
    assert (version_of(path), damage_of(path)) == (2, None)
    resumed = make_learner(settings)
    load_checkpoint(path, resumed)
    assert weights_hash(resumed.weights()) == expected
    resumed.step(pack_step(settings, episodes(2)))
    assert resumed.step(pack_step(settings, episodes(3))).metrics == later
    assert weights_hash(resumed.weights()) == weights_hash(learner.weights())


def test_a_full_disk_behind_the_files_is_told_and_the_checkpoint_before_stays(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick_settings(tiny_model)
    learner = make_learner(settings)
    save_checkpoint(tmp_path, learner, {}, source=tiny_model, keep=1)
    learner.step(pack_step(settings, episodes(0)))

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "to_disk", full)
    saving = begun(tmp_path, learner, tiny_model, [])
    with pytest.raises(OSError, match="No space left"):
        saving.wait()
    saving.before_write()  # nobody waits for what has failed
    found, damaged = newest_whole(tmp_path)
    assert found is not None
    assert (version_of(found), damaged) == (0, [])


KILLED = """
import sys, time
from pathlib import Path
from async_rl.trainer import manifest
from async_rl.trainer.manifest import write_partial, write_whole
from async_rl.trainer.saving import Saving

folder, place = Path(sys.argv[1]), int(sys.argv[2])
write_whole(folder / "step_000001", lambda into: (into / "weights").write_bytes(b"1" * 1000))
real, calls = manifest.to_disk, []

def to_disk(path):
    calls.append(path)
    if len(calls) > place:
        print("now", flush=True)
        time.sleep(1000)
    real(path)

manifest.to_disk = to_disk
partial = write_partial(folder / "step_000002", lambda into: (into / "weights").write_bytes(b"2" * 1000))
saving = Saving(partial=partial, version=2, stood_still_s=0.0, weights=(), record_hash=print,
                tidy=lambda: manifest.shutil.rmtree(folder / "step_000001"))
saving.begin().wait()
"""


@pytest.mark.parametrize(("place", "counts"), [(0, 1), (2, 1), (3, 2)], ids=["sums", "folder", "name"])
def test_a_kill_while_it_is_finished_falls_back_to_the_one_before(tmp_path: Path, place: int, counts: int) -> None:
    """The bytes are written, and the process is killed before its sums, its folder or its name are on the disk. The
    last has the name already: it is whole as long as the machine has power, and the one before is still there."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.wait()
    found, damaged = newest_whole(tmp_path)
    assert found is not None
    assert (version_of(found), damaged) == (counts, [])
    assert version_of(list_checkpoints(tmp_path)[0]) == 1
    made: Callable[[Path], object] = lambda into: (into / "weights").write_bytes(b"3")  # noqa: E731
    manifest.write_whole(tmp_path / "step_000003", made)  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".*")), "what the killed one left is cleared away"
