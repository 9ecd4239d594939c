"""A whole run whose generator is vLLM, on the CPU; one of vLLM's processes is killed on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support_command import Run, descendants, write_config

from async_rl.buffer.store import StoreReader
from async_rl.model.create import create_model_folder
from async_rl.run_folder import RunFolder, read_rows
from async_rl.task import make_task

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = pytest.mark.xdist_group("vllm")

STEPS = 100


def worker_of(generator: int) -> int | None:
    """vLLM's worker: the process whose parent is vLLM's, too."""
    owner = f"ASYNC_RL_VLLM_OWNER={generator}".encode()  # the tests' own vLLM may have left another one
    of_vllm = {pid for pid in descendants(generator) if owner in environment(pid).split(b"\0")}
    return next((pid for pid in sorted(of_vllm) if parent(pid) in of_vllm), None)


def environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_run_with_vllm_trains_and_survives_the_death_of_vllms_worker(tmp_path: Path) -> None:
    alphabet = make_task("guess", {}).alphabet  # type: ignore[attr-defined]
    model = tmp_path / "model"
    create_model_folder(
        model, alphabet=alphabet, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=64, seed=3
    )
    config = write_config(
        tmp_path, model, "generator.engine=vllm", f"trainer.steps={STEPS}", "checkpoint.every=0", "wire.timeout_s=120"
    )
    run = Run(config, RunFolder(tmp_path / "run"), longest_s=300.0)
    run.wait_for_training()
    worker = worker_of(run.pid("generator-0"))
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    said = run.said()
    assert run.process.returncode == 0, said
    events = list(read_rows(run.folder.events))
    (died,) = [event for event in events if event["event"] == "generator_died"]
    assert "vLLM" in died["reason"]
    summary = run.folder.summary.read_text()
    assert '"trajectories_failed": 0' in summary
    with StoreReader(run.folder.store) as store:
        assert len(list(store.batches())) == STEPS
        for step in range(STEPS):
            assert all(0 <= step - t.version_min <= 1 for t in store.trajectories(step=step))
    rows = list(read_rows(run.folder.metrics))
    assert max(row["lag/max"] for row in rows) >= 1
    assert worker_of(run.pid("generator-0")) is None
