"""A run whose generators are on another host, over a bad network: TCP with CURVE, real packets lost, late, out of
order, and none at all for a while."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_command import Run, write_config
from support_network import ADDRESSES, TwoHosts, Weather

from async_rl.instruments.replay import replay
from async_rl.observe.audit import audit_run
from async_rl.run_folder import RunFolder, read_rows
from async_rl.wire.keys import make_keys

FROZEN_S = 5.0


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command here (iproute2)")
    try:
        with TwoHosts(seed=7) as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network of its own can be made here: {error}")


class RunOnHost(Run):
    """A run on host 0."""

    hosts: TwoHosts

    def __post_init__(self) -> None:
        words = ["-m", "async_rl", "run", str(self.config), "--run-dir", str(self.folder.path)]
        self.process = subprocess.Popen(
            [*self.hosts.command(0), sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


def endpoint(run: Run) -> str:
    at = next(row["endpoint"] for row in read_rows(run.folder.events) if row["event"] == "buffer_ready")
    return f"tcp://{ADDRESSES[0]}:{at.rpartition(':')[2]}"


def joined(run: Run) -> int:
    return sum(row["event"] == "generator_joined" for row in read_rows(run.folder.events))


@pytest.mark.nightly
def test_a_bad_network_and_a_partition_lose_nothing(tmp_path: Path, tiny_model: Path, hosts: TwoHosts) -> None:
    keys = make_keys(tmp_path / "keys").folder
    config = write_config(
        tmp_path, tiny_model, "generator.count=0", "trainer.steps=80", "evaluation.every=20", f"wire.keys={keys}",
        f"wire.frozen_after_s={FROZEN_S}", "wire.endpoint=tcp://0.0.0.0:*", "checkpoint.every=20",
    )  # fmt: skip
    RunOnHost.hosts = hosts
    run = RunOnHost(config, RunFolder(tmp_path / "run"), longest_s=240)
    joiners: list[subprocess.Popen[str]] = []
    try:
        run.wait_for_event("buffer_ready")
        hosts.weather = Weather(loss=0.03, delay_s=(0.002, 0.03))
        for name in ("far-0", "far-1"):
            words = ["--connect", endpoint(run), "--keys", str(keys), "--name", name, "weights.transport=stream"]
            command = [*hosts.command(1), sys.executable, "-m", "async_rl", "generate", *words]
            joiners.append(
                subprocess.Popen(
                    [*command, f"model.path={tiny_model}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        run.wait_for(lambda: sum(1 for _ in read_rows(run.folder.metrics)) >= 10, "ten steps in bad weather")
        hosts.weather = Weather(parted=True)
        run.wait_for_event("generator_lost")  # longer than wire.frozen_after_s
        parted_at = sum(1 for _ in read_rows(run.folder.metrics))
        hosts.weather = Weather(loss=0.03, delay_s=(0.002, 0.03))
        run.wait_for(lambda: joined(run) == 4, "both generators to join again")
        said = run.said()
        assert run.process.returncode == 0, said
        for joiner in joiners:
            out, _ = joiner.communicate(timeout=60)
            assert joiner.returncode == 0, out
            assert "Traceback" not in out
    finally:
        for process in (run.process, *joiners):
            if process.poll() is None:
                os.kill(process.pid, 9)
                process.communicate()
    assert hosts.lost > 20
    assert hosts.overtaken > 100
    assert parted_at < 80
    audit = audit_run(run.folder)
    assert audit.violations == ()
    assert audit.groups_trained == 4 * 80
    assert replay(run.folder).difference is None
    summary = json.loads(run.folder.summary.read_text())
    assert summary["canary"]["unchecked"] == []
