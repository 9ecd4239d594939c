"""The processes beside actors of Ray, without Ray: a process stands for the actor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest
from support_command import alive, descendants, wait_for
from support_run import quick_settings

from async_rl.cluster.ray_process import AnyOrder, GeneratorOrder, Outcome, RunOrder
from async_rl.run_folder import RunFolder, read_rows

ENDLESS = ("trainer.steps=100000", "checkpoint.every=100000")


@pytest.fixture
def actor() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def start(order: AnyOrder) -> subprocess.Popen[str]:
    text = msgspec.json.encode(order).decode()
    return subprocess.Popen(
        [sys.executable, "-m", "async_rl.cluster.ray_process", text],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def run_order(place: Path, parent: int, model: Path, *words: str) -> RunOrder:
    keys = place / "beside" / "keys"
    keys.mkdir(parents=True)
    return RunOrder(
        parent=parent,
        directory=str(place),
        keys=str(keys),
        outcome=str(place / "beside" / "outcome.json"),
        path="run",
        settings=asdict(quick_settings(model, *words)),
        grace_s=20.0,
    )


@pytest.mark.parametrize(
    "how",
    [pytest.param("told", marks=pytest.mark.nightly), pytest.param("actor", marks=pytest.mark.nightly), "first"],
)
def test_a_run_ends_in_good_order_whoever_ends_it(
    how: str, tmp_path: Path, tiny_model: Path, actor: subprocess.Popen[bytes]
) -> None:
    """Told by a signal, when its actor is killed, and when Ray kills the first of its two processes."""
    first = start(run_order(tmp_path, actor.pid, tiny_model, *ENDLESS))
    run = RunFolder(tmp_path / "run")
    wait_for(run.metrics.exists, "the first step", 240)
    seen = descendants(first.pid)
    if how == "told":
        first.send_signal(signal.SIGTERM)
    elif how == "actor":
        actor.kill()
    else:
        first.kill()
    wait_for(lambda: not any(map(alive, seen)), "the end of every process", 60)
    out, _ = first.communicate(timeout=60)
    steps = len(list(read_rows(run.metrics)))
    assert (run.checkpoints / f"step_{steps:06d}").is_dir(), out
    assert [row["signal"] for row in read_rows(run.events) if row["event"] == "interrupted"] == ["SIGTERM"]
    assert not (tmp_path / "beside" / "keys").exists()
    if how == "told":
        assert first.returncode == 128 + signal.SIGTERM
        outcome = msgspec.json.decode((tmp_path / "beside" / "outcome.json").read_bytes(), type=Outcome)
        assert outcome == Outcome(kind="interrupted", message="SIGTERM")
    else:
        assert not (tmp_path / "beside").exists()  # nobody reads it any more


def test_what_goes_wrong_is_left_for_the_actor(tmp_path: Path, tiny_model: Path) -> None:
    order = run_order(tmp_path, os.getpid(), tmp_path / "nowhere")
    done = start(order)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 2, out
    outcome = msgspec.json.decode(Path(order.outcome).read_bytes(), type=Outcome)
    assert outcome.kind == "user"
    assert "nowhere" in outcome.message
    keys = tmp_path / "keys"
    keys.mkdir(exist_ok=True)
    generator = GeneratorOrder(
        parent=os.getpid(), directory=str(tmp_path), keys=str(keys), outcome=str(tmp_path / "o"), name="x",
        endpoint="tcp://127.0.0.1:1",
    )  # fmt: skip
    done = start(generator)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 2
    assert "keys" in out
