"""What a run costs on Ray beside the same run without: processor time of everything, Ray's own processes included.

    python bench/cluster.py --model models/quickstart --steps 100

Starts a Ray cluster of two nodes on this machine (needs Ray), runs the same steps on it and locally, one after the
other, and ends it. Processor time is that of everything in a control group (root, cgroup v1): what Ray starts is not
waited for by who started it, so that no parent knows its time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
MEMORY = 80_000_000


GROUP = Path("/sys/fs/cgroup/cpuacct")


class ProcessorTime:
    """Of this program and everything that it starts from now on, by a control group of the kernel's."""

    def __init__(self) -> None:
        self.group = GROUP / f"async-rl-bench-{os.getpid()}"
        try:
            self.group.mkdir()
            (self.group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise SystemExit(f"processor time is counted in a control group, which root may make: {error}") from None

    def seconds(self) -> float:
        return int((self.group / "cpuacct.usage").read_text()) / 1e9

    def close(self) -> None:
        for pid in (self.group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (GROUP / "cgroup.procs").write_text(pid)
        with suppress(OSError):  # something has not ended yet
            self.group.rmdir()


def seconds_of(clock: ProcessorTime, work: Callable[[], None]) -> tuple[float, float]:
    """(processor seconds, wall seconds)."""
    before, began = clock.seconds(), time.monotonic()
    work()
    return clock.seconds() - before, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    chosen = parser.parse_args()
    # as the processes of a local run; a busy machine starts a node slowly
    os.environ.update({"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"})
    from ray.cluster_utils import Cluster

    clock = ProcessorTime()
    with tempfile.TemporaryDirectory() as place:
        always = [
            f"model.path={chosen.model.absolute()}", f"trainer.steps={chosen.steps}", "evaluation.every=0", "seed=1",
            "optimizer.schedule=constant", "optimizer.final_share=0", "trainer.threads=1", "generator.threads=1",
        ]  # fmt: skip

        def run(name: str, *words: str) -> None:
            command = [sys.executable, "-m", "async_rl", "run", str(CONFIG), "--quiet", "--run-dir", f"{place}/{name}"]
            subprocess.run([*command, *always, *words], check=True)

        def on_ray(*, runs: bool) -> None:
            head = {"num_cpus": 2, "object_store_memory": MEMORY, "include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
            if runs:
                words = ("cluster.engine=ray", f"cluster.address={cluster.address}", "cluster.generators=2")
                run("ray", *words)
            cluster.shutdown()

        rows = {
            "local": seconds_of(clock, lambda: run("local", "generator.count=2")),
            "on Ray, its nodes included": seconds_of(clock, lambda: on_ray(runs=True)),
            "Ray's nodes alone, started and ended": seconds_of(clock, lambda: on_ray(runs=False)),
        }
    clock.close()
    for name, (used, wall) in rows.items():
        print(f"{name}: {used:.1f} s of processor time, {wall:.0f} s")


if __name__ == "__main__":
    main()
