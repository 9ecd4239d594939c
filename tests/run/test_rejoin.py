"""A generator of another shell that was stopped for too long: given up, and back again when it wakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support_command import LONGEST_S, Run, write_config

from async_rl.run_folder import RunFolder, read_rows


@pytest.mark.nightly
def test_a_joined_generator_that_was_frozen_begins_anew_when_it_wakes(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model, "trainer.steps=100000", "wire.frozen_after_s=3")
    run = Run(config, RunFolder(tmp_path / "run"))
    words = [sys.executable, "-m", "async_rl", "generate", "--run", str(run.folder.path), "--name", "near"]

    def holds(event: str) -> bool:
        return any(row["event"] == event and row["name"] == "near" for row in read_rows(run.folder.events))

    def generators() -> list[float]:
        return [row["generators"] for row in read_rows(run.folder.metrics)]

    run.wait_for_event("buffer_ready")
    near = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        run.wait_for(lambda: 2 in generators(), "both generators")
        (pid,) = (row["pid"] for row in read_rows(run.folder.events) if row["event"] == "generator_joined")
        os.kill(pid, signal.SIGSTOP)
        run.wait_for(lambda: holds("generator_lost"), "the buffer to give it up")
        steps = len(generators())
        run.wait_for(lambda: len(generators()) > steps + 3, "the run to go on without it")
        assert generators()[-1] == 1
        assert near.poll() is None, "it is not the launcher's child"
        os.kill(pid, signal.SIGCONT)
        run.wait_for(lambda: generators()[-1] == 2, "it to be back")
        steps = len(generators())
        run.wait_for(lambda: len(generators()) > steps + 3, "the run to go on with it")
        near.terminate()
        said, _ = near.communicate(timeout=LONGEST_S)
        assert "Traceback" not in said, said
        run.wait_for(lambda: holds("generator_left"), "it to leave")
        run.press_ctrl_c()
        assert "Traceback" not in run.said()
        assert run.left_behind() == []
    finally:
        if near.poll() is None:
            near.kill()
            near.communicate()
