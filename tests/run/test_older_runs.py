"""A run folder that 0.1.0 wrote: killed with SIGKILL behind its first checkpoint, of step 4 of 12.

It goes on under this version: nothing of it is lost, and its batches give the weights that 0.1.0 recorded. Up to 0.3.0
these were the same bits. Since 0.4.0, which forms sums in another order, they agree to the rounding of float32. The
folder lies in `tests/data/run_0.1.0.tar.xz`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from async_rl.buffer.store import StoreReader
from async_rl.instruments.replay import describe_replay, replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import load_checkpoint
from async_rl.trainer.learner import Learner
from async_rl.trainer.packing import pack_step
from async_rl.trainer.team import weights_hash
from async_rl.trajectory.codec import unpack
from async_rl.version import __version__

ARCHIVE = Path(__file__).parent.parent / "data" / "run_0.1.0.tar.xz"


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Unpacked; its settings name the model relative to the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "run")


def train(run: RunFolder, learner: Learner, steps: range) -> dict[str, torch.Tensor]:
    settings = run.settings()
    with StoreReader(run.store) as store:
        for step in steps:
            learner.step(pack_step(settings, [unpack(blob) for blob in store.load_batch(step) or ()]))
    return dict(learner.weights())


def test_the_batches_of_an_older_version_give_its_weights(old_run: RunFolder) -> None:
    learner = make_learner(old_run.settings())
    initial = {name: tensor.clone() for name, tensor in learner.weights().items()}
    recorded = load_file(old_run.checkpoints / "step_000004" / "model.safetensors")
    for name, tensor in train(old_run, learner, range(4)).items():
        moved = recorded[name] - initial[name]
        assert moved.norm() > 0
        assert (tensor - recorded[name]).norm() < 1e-4 * moved.norm(), name


def test_a_replay_says_that_another_version_trained(old_run: RunFolder) -> None:
    said = describe_replay(replay(old_run, until=1), old_run)
    assert f"the run was begun by async_rl 0.3.0 or older, this is {__version__}: another version may round" in said


def test_a_run_of_an_older_version_is_resumed_to_its_end(old_run: RunFolder) -> None:
    before = [row for row in read_rows(old_run.metrics) if row["step"] < 4]
    start = Path(shutil.copytree(old_run.checkpoints / "step_000004", "step_000004"))
    done = subprocess.run(
        [sys.executable, "-m", "async_rl", "run", "--resume", "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at step 4 from step_000004" in done.stdout
    rows = list(read_rows(old_run.metrics))
    assert rows[:4] == before
    assert [row["step"] for row in rows][-8:] == list(range(4, 12))
    audit = audit_run(old_run)
    assert not audit.violations
    learner = make_learner(old_run.settings())
    load_checkpoint(start, learner)
    weights = train(old_run, learner, range(4, 12))
    (last,) = [row["hash"] for row in read_rows(old_run.weights) if row["version"] == 12 and "hash" in row]
    assert weights_hash(weights) == last
