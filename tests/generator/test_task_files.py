"""What code of a task does to files and timers of its process: the first ends it, the second is put right."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from async_rl.generator.task_code import TaskGuard, run_to_end


def test_one_that_closes_files_of_the_process_ends_it() -> None:
    """Sockets, store and stacks may be among them: nothing that this process does from then on can be relied on."""
    told: list[str] = []
    guard = TaskGuard(on_stuck=told.append)

    async def closes() -> None:
        os.close(max(guard.sentinels))

    run_to_end(guard.steps(closes()))
    assert told == ["the task or its reward closed files of this process that are not its own"]

    guard = TaskGuard(on_stuck=told.append)

    async def replaces() -> None:
        with open(os.devnull) as other:
            os.dup2(other.fileno(), max(guard.sentinels))

    run_to_end(guard.steps(replaces()))
    os.close(max(guard.sentinels))
    assert len(told) == 2


def test_low_files_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `os.closerange(0, 21)` closes them, before sockets notice by themselves."""
    told: list[str] = []
    with (tmp_path / "stacks").open("ab") as low:
        monkeypatch.setattr("async_rl.process._stacks", low)
        guard = TaskGuard(on_stuck=told.append)
        os.close(next(file for file in guard.sentinels if file != low.fileno()))
        guard.sentinels = {low.fileno(): guard.sentinels[low.fileno()]}

        async def replaces() -> None:
            with open(os.devnull) as other:
                os.dup2(other.fileno(), low.fileno())

        run_to_end(guard.steps(replaces()))
    assert len(told) == 1


def test_the_alarm_works_behind_a_reward_that_used_the_timer() -> None:
    def disarms(*_: object) -> float:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        return 1.0

    async def run() -> tuple[float, float]:
        guard = TaskGuard(limit_s=60.0)

        async def judge() -> None:
            disarms()

        with guard.alarm():
            await guard.steps(judge())
            assert signal.getsignal(signal.SIGALRM) == guard._check
            return signal.getitimer(signal.ITIMER_REAL)

    assert run_to_end(run())[0] > 0
