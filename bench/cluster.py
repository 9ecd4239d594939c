"""What a run costs on Ray beside the same run without: processor time of everything, Ray's own processes included.

    python bench/cluster.py --model models/quickstart --steps 100

Starts a Ray cluster of two nodes on this machine (needs Ray), runs the same steps on it and locally, one after the
other, and ends it. Processor time is that of all processes that were started, also of those that outlive who started
them: they become children of this program, which waits for them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
MEMORY = 80_000_000


PR_SET_CHILD_SUBREAPER = 36
"""of <linux/prctl.h>"""
LAST_S = 60.0
"""time that what was started has to end"""


def seconds_of(work: Callable[[], None]) -> tuple[float, float]:
    """(processor seconds of processes that ended, wall seconds)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    with suppress(ChildProcessError):  # there are no more
        deadline = time.monotonic() + LAST_S
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    chosen = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # as the processes of a local run; a busy machine starts a node slowly
    os.environ.update({"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"})
    from ray.cluster_utils import Cluster

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
            "local": seconds_of(lambda: run("local", "generator.count=2")),
            "on Ray, its nodes included": seconds_of(lambda: on_ray(runs=True)),
            "Ray's nodes alone, started and ended": seconds_of(lambda: on_ray(runs=False)),
        }
    for name, (used, wall) in rows.items():
        print(f"{name}: {used:.1f} s of processor time, {wall:.0f} s")


if __name__ == "__main__":
    main()
