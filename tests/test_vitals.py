"""The launcher's ear: signs of life through a pipe, silence, and its own absence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_rl.run.child import describe_end, memory_kills
from async_rl.run.liveness import LONGEST_START_S, START_S, Vitals, processor_s
from async_rl.wire.heartbeat import STARTING

LIMIT_S = 3.0


@pytest.fixture
def vitals() -> Iterator[Vitals]:
    vitals = Vitals(LIMIT_S, ran_s=lambda _: 0.0)
    vitals.add(7, "trainer", 0.0)
    yield vitals
    vitals.close()


def pulse(vitals: Vitals, pid: int, doing: str, since_s: float = 0.5) -> None:
    line = {"name": "trainer", "pid": pid, "doing": doing, "since_s": since_s}
    os.write(vitals.ends[1], json.dumps(line).encode() + b"\n")


def look(vitals: Vitals, since: float, until: float) -> None:
    """The launcher looks ten times a second."""
    for tenth in range(int(10 * since) + 1, int(10 * until) + 1):
        vitals.poll(tenth / 10)


def test_a_silent_process_is_named_with_the_last_thing_it_did(vitals: Vitals) -> None:
    pulse(vitals, 7, "training step 12", since_s=2.0)
    look(vitals, 0, 3)
    assert vitals.frozen(3.0) == []
    look(vitals, 3, 4)
    ((pid, why),) = vitals.frozen(4.0)
    assert pid == 7
    assert why == (
        "gave no sign of life for 3.9 s (wire.frozen_after_s=3): it is frozen (stopped, or held up by code that blocks "
        "all of Python); last heard: training step 12, for 2.0 s"
    )


def test_one_that_has_not_spoken_yet_gets_time_to_start(vitals: Vitals) -> None:
    look(vitals, 0, START_S)
    assert vitals.frozen(START_S) == []
    look(vitals, START_S, START_S + 1)
    assert "it hangs before its first line" in vitals.frozen(START_S + 1)[0][1]


def test_one_whose_imports_are_slow_is_not_frozen_for_minutes() -> None:
    """A real process: a busy import holds Python's lock; then one that is stopped in the middle of it."""
    slow = "import sys\nwhile True: sum(range(10**7))"
    with subprocess.Popen([sys.executable, "-c", slow]) as process:
        vitals = Vitals(LIMIT_S)
        try:
            vitals.add(process.pid, "buffer", 0.0)
            pulse(vitals, process.pid, STARTING)
            for second in range(1, int(2 * START_S)):  # of the launcher's clock
                before = processor_s(process.pid)
                while processor_s(process.pid) <= before:
                    assert process.poll() is None
                vitals.poll(float(second))
                assert vitals.frozen(float(second)) == []
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            at = 2 * START_S
            vitals.frozen(at)  # what it did until then
            look(vitals, at, at + START_S + 1)
            ((pid, why),) = vitals.frozen(at + START_S + 1)
            assert (pid, "it hangs before its first line" in why) == (process.pid, True)
        finally:
            process.kill()
            vitals.close()


def test_one_that_starts_for_ever_is_frozen(vitals: Vitals) -> None:
    vitals.ran_s = lambda _: time.monotonic()
    for second in range(1, int(LONGEST_START_S + START_S) + 2):
        vitals.poll(float(second))
        found = vitals.frozen(float(second))
        assert bool(found) == (second > LONGEST_START_S + START_S), second


def test_a_launcher_that_was_away_gives_everybody_their_time_anew(vitals: Vitals) -> None:
    pulse(vitals, 7, "training step 12")
    look(vitals, 0, 1)
    vitals.poll(100.0)
    assert vitals.frozen(100.0) == []
    look(vitals, 100, 104)
    assert [pid for pid, _ in vitals.frozen(104.0)] == [7]


def test_words_of_a_process_that_is_gone_and_cut_lines_are_let_go(vitals: Vitals) -> None:
    pulse(vitals, 6, "an old life")
    os.write(vitals.ends[1], b'{"pid": 7, "doi\n[]\n')
    vitals.poll(1.0)
    assert [(row["pid"], row["doing"]) for row in vitals.rows(1.0)] == [(7, "starting")]
    os.write(vitals.ends[1], b'{"pid": 7, "doing": "half a line", ')
    vitals.poll(1.1)
    os.write(vitals.ends[1], b'"since_s": 1}\n')
    vitals.poll(1.2)
    assert [(row["doing"], row["since_s"], row["silent_s"]) for row in vitals.rows(1.2)] == [("half a line", 1.0, 0.0)]
    vitals.remove(7)
    assert vitals.rows(1.2) == []


def test_a_death_for_lack_of_memory_is_told_from_other_kills(tmp_path: Path) -> None:
    assert memory_kills(tmp_path) is None
    group = tmp_path / "sys/fs/cgroup/run"
    for folder in (tmp_path / "proc/self", group):
        folder.mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 12\noom_kill 3\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/run\n")
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 2\n")
    assert memory_kills(tmp_path) == 5
    now = memory_kills()
    assert "or the machine ran out of memory" in describe_end(-9, None)
    if now is not None:
        assert describe_end(-9, now - 1) == "was killed by the kernel because memory ran out (SIGKILL)"
        assert describe_end(-9, now) == "was killed from outside (SIGKILL), not by the kernel for lack of memory"
