"""A torchrun that outlives its ranks is ended; processes stand for torchrun and for a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_rl.run.torchrun_watch import start_watch, watch

WITH_RANK = "import signal, subprocess; signal.signal(15, signal.SIG_IGN); rank = subprocess.Popen(['cat'])"
"""as a torchrun that waits in a library: deaf to SIGTERM, and its rank stays a zombie"""


@pytest.fixture
def torchrun() -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", f"{WITH_RANK}; print(rank.pid, flush=True); signal.pause()", "--rdzv-endpoint=far:1"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def rank_of(torchrun: subprocess.Popen[str]) -> int:
    assert torchrun.stdout is not None
    return int(torchrun.stdout.readline())


def test_it_is_ended_a_while_after_its_ranks(
    torchrun: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("async_rl.run.torchrun_watch.TOLD_S", 0.2)
    rank = rank_of(torchrun)
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.append(watch(torchrun.pid, tmp_path / "summary.json", wait_s=0.2, poll_s=0.05))
    )
    thread.start()
    thread.join(1.0)
    assert torchrun.poll() is None  # its rank lives
    os.kill(rank, signal.SIGKILL)
    thread.join(60)
    assert found == [True]
    assert torchrun.wait(60) == -signal.SIGKILL
    assert "its meeting point (far:1) has died or cannot be reached" in capfd.readouterr().err


def test_it_may_wait_for_others_when_the_run_is_done(torchrun: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(rank_of(torchrun), signal.SIGKILL)
    (tmp_path / "summary.json").touch()
    assert not watch(torchrun.pid, tmp_path / "summary.json", wait_s=0.1, poll_s=0.05)
    assert torchrun.poll() is None


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "1"},
        {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"},
    ],
)
def test_nobody_is_watched_who_is_no_torchrun_or_starts_ranks_again(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: started.append(words))
    start_watch(environment, tmp_path)
    assert started == []
    start_watch({"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_MAX_RESTARTS": "0"}, tmp_path)
    assert len(started) == 1
