"""Generators that join a real run from another process, and leave it; who may not gets nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_command import LONGEST_S, Run, write_config

from async_rl.run.join import sees_files_of
from async_rl.run_folder import RunFolder, read_rows
from async_rl.wire.endpoint import this_host
from async_rl.wire.keys import make_keys
from async_rl.wire.messages import Welcome


class Joiner:
    """`async-rl generate` in a process of its own."""

    def __init__(self, *words: str, cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl", "generate", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Wait for it; exit code and everything it printed."""
        said, _ = self.process.communicate(timeout=LONGEST_S)
        return self.process.returncode, said

    def tell(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def joiners() -> Iterator[Callable[..., Joiner]]:
    """Starts joiners; none is left behind."""
    started: list[Joiner] = []

    def start(*words: str, cwd: Path | None = None) -> Joiner:
        started.append(Joiner(*words, cwd=cwd))
        return started[-1]

    yield start
    for joiner in started:
        if joiner.process.poll() is None:
            joiner.process.kill()
        joiner.process.communicate()


def groups_of(folder: RunFolder, name: str) -> int:
    """Groups this generator was given first and that are in a batch."""
    with sqlite3.connect(f"file:{folder.store}?mode=ro", uri=True) as store:
        ask = "SELECT count(*) FROM groups WHERE generator = ? AND step IS NOT NULL"
        return int(store.execute(ask, (name,)).fetchone()[0])


def generators_of(folder: RunFolder) -> set[str]:
    """Whose trajectories are in the store."""
    with sqlite3.connect(f"file:{folder.store}?mode=ro", uri=True) as store:
        return {str(name) for (name,) in store.execute("SELECT DISTINCT generator FROM trajectories")}


def endpoint(folder: RunFolder, kind: str = "buffer_ready") -> str:
    return next(row["endpoint"] for row in read_rows(folder.events) if row["event"] == kind)


def test_generators_of_other_shells_and_hosts_carry_a_run_and_come_and_go(
    tmp_path: Path, tiny_model: Path, joiners: Callable[..., Joiner]
) -> None:
    """None is started by the launcher. One joins as from another host: TCP, a copy of three key files, weights
    as a stream. One joins by the run's folder and is told to leave in the middle."""
    make_keys(tmp_path / "keys")
    config = write_config(
        tmp_path, tiny_model, "generator.count=0", "trainer.steps=160", "wire.endpoint=tcp://:*",
        f"wire.keys={tmp_path / 'keys'}",
    )  # fmt: skip
    run = Run(config, RunFolder(tmp_path / "run"))
    try:
        run.wait_for_event("buffer_ready")
        (tmp_path / "elsewhere" / "keys").mkdir(parents=True)
        for name in ("server.key", "client.key", "client.key_secret"):
            shutil.copy2(tmp_path / "keys" / name, tmp_path / "elsewhere" / "keys" / name)
        far = joiners(
            "--connect", endpoint(run.folder), "--keys", "keys", "--name", "far", "weights.transport=stream",
            f"model.path={tiny_model}", cwd=tmp_path / "elsewhere",
        )  # fmt: skip
        near = joiners("--run", str(run.folder.path), "--name", "near")
        run.wait_for_training()
        run.wait_for(lambda: all(groups_of(run.folder, name) for name in ("near", "far")), "groups of both")

        stranger = make_keys(tmp_path / "strange").folder
        shutil.copy2(tmp_path / "keys" / "server.key", stranger / "server.key")
        strange = joiners("--connect", endpoint(run.folder), "--keys", str(stranger))
        second = joiners("--run", str(run.folder.path), "--name", "far")
        code, said = strange.end()
        assert code == 2
        assert f"does not take the keys of {stranger}" in said
        code, said = second.end()
        assert code == 2
        assert "there is a generator of the name far; choose another" in said

        near.tell(signal.SIGTERM)
        code, said = near.end()
        assert code == 128 + signal.SIGTERM, said
        assert "stopped by SIGTERM" in said
        assert "Traceback" not in said

        out = run.said()
        assert run.process.returncode == 0, out
        code, said = far.end()
        assert code == 0, said
        assert generators_of(run.folder) == {"far", "near"}
        summary = json.loads(run.folder.summary.read_text())
        assert summary["canary"]["unchecked"] == []
        assert summary["canary"]["checked"] > 100
        rows = list(read_rows(run.folder.metrics))
        assert len(rows) == 160
        assert {1.0, 2.0} <= {row["generators"] for row in rows}
        assert rows[-1]["generators"] == 1.0
        assert max(row["lag/max"] for row in rows) <= 1
        told = {(row["event"], row.get("name")) for row in read_rows(run.folder.events)}
        assert {("generator_joined", "far"), ("generator_joined", "near"), ("generator_left", "near")} <= told
        assert "peers_turned_away" in {event for event, _ in told}
        assert run.left_behind() == []
    finally:
        if run.process.poll() is None:
            run.process.kill()


def test_a_container_of_the_same_machine_does_not_work_in_a_folder_of_the_same_name(tmp_path: Path) -> None:
    told = {"settings": {}, "task_digest": "", "segment": "", "weights": "", "folder": str(tmp_path)}
    beside = Welcome(run="runs/x", host=this_host(), **told)
    assert not sees_files_of(beside)  # the folder is here, the run is not
    (tmp_path / "runs" / "x").mkdir(parents=True)
    RunFolder(tmp_path / "runs" / "x").config.touch()
    assert sees_files_of(beside)
    assert sees_files_of(Welcome(run=str(tmp_path / "runs" / "x"), host=this_host(), **told))
    assert not sees_files_of(Welcome(run="runs/x", host="another", **told))
