"""SLURM for tests: a stand-in that starts what a batch file has, and a real one where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support_ports import HeldPorts

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
options = {}
while words and words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
with open(os.environ["SRUN_LOG"], "a") as log:
    log.write(" ".join(sys.argv[1:][: len(options)]) + chr(10))
size = int(options["--ntasks"])
tasks = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}, start_new_session=True)
    for i in range(size)
]
def end(number, frame):
    for task in tasks:
        try:
            os.killpg(task.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
signal.signal(signal.SIGTERM, end)
codes = [abs(task.wait()) for task in tasks]
for task in tasks:
    try:
        os.killpg(task.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
sys.exit(max(codes))
"""
"""as srun does: every task is the same command, told apart by variables; SIGTERM to srun ends all of them, and when all
have ended, what they have left behind is killed"""


class FakeSlurm:
    """`srun`, `scontrol` and `async-rl` in a folder for the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        program(folder / "async-rl", f'exec "{sys.executable}" -m async_rl "$@"')
        program(folder / "scontrol", f'echo "$@" >> "{folder}/requeued"')
        (folder / "srun.py").write_text(SRUN)
        program(folder / "srun", f'exec "{sys.executable}" "{folder}/srun.py" "$@"')

    def start(self, script: Path, job: int, where: Path) -> subprocess.Popen[str]:
        """The job's script on its first node; `job` becomes its number."""
        path = f"{self.folder}:{os.environ['PATH']}"
        more = {"SLURM_JOB_ID": str(job), "HEAD": "127.0.0.1", "SRUN_LOG": str(self.folder / "steps")}
        return subprocess.Popen(
            ["bash", str(script)], cwd=where, env={**os.environ, **more, "PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def steps(self) -> list[str]:
        """Options of each srun."""
        return (self.folder / "steps").read_text().splitlines()

    @property
    def requeued(self) -> list[str]:
        return (self.folder / "requeued").read_text().splitlines()


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


# -------------------- a real one


def installed() -> bool:
    """Whether SLURM can be started here: its daemons are there, and we may start them."""
    there = f"{os.environ['PATH']}:/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(name, path=there) for name in PROGRAMS)


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of three nodes, all on this machine; the environment in which `sbatch` and the others find it. Ends
    every daemon that it has started."""
    (folder / "state").mkdir(parents=True)
    held = HeldPorts(4)
    control, *nodes = held.numbers
    host, config, key, door = socket.gethostname(), folder / "slurm.conf", folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    values = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": control,
        "AuthType": "auth/munge", "AuthInfo": f"socket={door}", "CredType": "cred/munge", "SlurmUser": "root",
        "SlurmdUser": "root", "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "control.pid", "SlurmdPidFile": folder / "%n.pid",
        "ProctrackType": "proctrack/pgid", "TaskPlugin": "task/none", "MpiDefault": "none",
        "AccountingStorageType": "accounting_storage/none", "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=2,requeue_delay=1",
        "SlurmdParameters": "config_overrides", "ReturnToService": 2, "KillWait": 5, "SlurmdTimeout": 300,
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in values.items()]
    lines += [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000"
        for i, port in enumerate(nodes, start=1)
    ]
    config.write_text("\n".join([*lines, "PartitionName=all Nodes=ALL Default=YES State=UP"]) + "\n")
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    commands = [
        # --force: it would refuse folders that others may write
        ["munged", "--foreground", "--force", f"--socket={door}", f"--key-file={key}", f"--pid-file={folder}/munge.pid",
         f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", f"n{i}"] for i in (1, 2, 3)),
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("w") as log:
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
                if command[0] == "munged":
                    until(door.exists, "munged's socket")
            until(lambda: said(["sinfo", "-h", "-o", "%T %D"], environment) == "idle 3", "three idle nodes")
            yield environment
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            held.close()


def said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def until(condition: object, what: str, longest_s: float = 120.0) -> None:
    deadline = time.monotonic() + longest_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {longest_s:g} s for {what}"
        time.sleep(0.2)
