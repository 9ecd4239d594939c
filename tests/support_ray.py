"""A Ray cluster of several nodes on this machine, as small as Ray gets, and a run on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from support_command import alive, descendants, wait_for, write_config

from async_rl.run_folder import RunFolder, read_rows

INSTALLED = find_spec("ray") is not None
MEMORY = 80_000_000
"""bytes of a node's object store, the least that Ray takes"""
SMALL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}
FAST = ("cluster.engine=ray", "cluster.trainer_cpus=0.1", "cluster.generator_cpus=0.5", "wire.timeout_s=240")
LONGEST_S = 400.0


@contextmanager
def nodes(**head: Any) -> Iterator[Any]:
    """A cluster with its head, which has the resources `head`."""
    os.environ.update(SMALL)
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"object_store_memory": MEMORY, "include_dashboard": False, **head}
    )
    try:
        yield cluster
    finally:
        cluster.shutdown()


def add(cluster: Any, **resources: Any) -> Any:
    return cluster.add_node(object_store_memory=MEMORY, **resources)


def lose(cluster: Any, node: Any) -> None:
    """A node dies at once with everything on it, as when its power fails."""
    found: set[int] = set()
    for process in node.all_processes.values():
        for one in process:
            found |= descendants(one.process.pid)
    cluster.remove_node(node, allow_graceful=False)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class RayRun:
    """`async-rl run` in a folder of its own, on the cluster."""

    cluster: Any
    place: Path
    config: Path
    words: tuple[str, ...]
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.place / "run")
        self.start([str(self.config), "--run-dir", "run", f"cluster.address={self.cluster.address}", *self.words])

    def start(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl", "run", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.place, start_new_session=True,
            env={**os.environ, **SMALL},
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return len(list(read_rows(self.folder.metrics)))

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in read_rows(self.folder.events) if row["event"] == kind]

    def wait_for(self, condition: Any, what: str) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, what, LONGEST_S)
        assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()[0]}"

    def said(self) -> str:
        return self.process.communicate(timeout=LONGEST_S)[0]


def ray_run(cluster: Any, place: Path, model: Path, *words: str) -> RayRun:
    config = write_config(place, model, "trainer.threads=1", "generator.threads=1")
    return RayRun(cluster=cluster, place=place, config=config, words=(*FAST, *words))


def asked(cluster: Any, expression: str) -> str:
    """What another program that connects to the cluster finds. `expression`: of Python, with `ray`."""
    script = (
        f"import logging, ray\nray.init('{cluster.address}', logging_level=logging.ERROR, log_to_driver=False)\n"
        f"print({expression})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NAMES = "sorted(a['name'] for a in ray.util.list_named_actors(all_namespaces=True))"
GROUPS = "sorted(g['name'] for g in ray.util.placement_group_table().values() if g['state'] != 'REMOVED')"


def processes_of_ours(place: Path) -> list[int]:
    """Processes beside actors that work for a run in this folder."""
    found = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True, check=False).stdout.split()
    return [int(pid) for pid in found if alive(int(pid)) and int(pid) != os.getpid()]
