"""`async-rl launch slurm | kubernetes`: writes the file that starts a run on a cluster.

Imports what it needs when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from async_rl.cli.commands import FILE, Commands, add_config, complete
from async_rl.errors import UserError

SLURM, KUBERNETES = "slurm", "kubernetes"
OWN = {
    SLURM: ("partition", "account", "relay", "trainer_nodes"),
    KUBERNETES: ("image", "namespace", "claim", "storage"),
}
"""options that only one of them has"""
NUMBERS = (
    ("generators", "N", "generators in all (default: generator.count of the config)"),
    ("gpus-per-generator", "N", "GPUs of each (default: what its engine uses); with vLLM sets vllm.tensor_parallel"),
    ("cpus", "N", "CPUs of each generator (default: generator.threads, else 4, or 8 a GPU)"),
    ("memory", "GB", "memory of each generator (default: the cluster's)"),
    ("trainer-cpus", "N", "CPUs of a node of the trainer (default: by its ranks and threads, and 2)"),
    ("trainer-memory", "GB", "memory of a node of the trainer (default: the cluster's)"),
)


def add_commands(commands: Commands) -> None:
    """Declare the command in the present group."""
    launch = commands.add(
        "launch",
        "write the file that starts a run on SLURM or Kubernetes",
        about="The trainer and the buffer get one part of the cluster, generators another, which they may leave and "
        "join. The file says at its top how it is submitted; it starts the commands that you would type.",
        example="async-rl launch slurm configs/quickstart.yaml --generators 16 --time 12:00:00\n"
        "async-rl launch kubernetes configs/quickstart.yaml --generators 16 --image registry/async-rl:1",
        work=_launch,
    )
    launch.add_argument("cluster", choices=(SLURM, KUBERNETES), help="what the file is for")
    add_config(launch)
    for name, unit, text in NUMBERS:
        launch.add_argument(f"--{name}", type=int, metavar=unit, help=text)
    launch.add_argument(
        "--time", metavar="H:MM:SS", help="longest time of the job, also D-HH:MM:SS (default: the cluster's)"
    )
    output = launch.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (default: NAME.sbatch or .yaml)"
    )
    complete(output, FILE)
    slurm = launch.add_argument_group("slurm")
    slurm.add_argument("--partition", metavar="NAME", help="where the job waits (default: the cluster's)")
    slurm.add_argument("--account", metavar="NAME", help="who pays (default: yours)")
    slurm.add_argument(
        "--trainer-nodes", type=int, metavar="N", help="nodes that the trainer's ranks are spread over (default 1)"
    )
    slurm.add_argument(
        "--relay", action="store_true", default=None, help="fetch weights once for each node of generators"
    )
    kubernetes = launch.add_argument_group("kubernetes")
    kubernetes.add_argument("--image", metavar="IMAGE", help="container image that has async-rl (needed)")
    kubernetes.add_argument("--namespace", metavar="NAME", help="of all objects (default: your context's)")
    kubernetes.add_argument(
        "--claim", action="append", metavar="CLAIM=PATH", help="a volume that all pods have at PATH: models, data"
    )  # fmt: skip
    kubernetes.add_argument("--storage", metavar="SIZE", help="of the volume for the run's folder (default 50Gi)")


def _launch(arguments: argparse.Namespace) -> int:
    from async_rl.cluster.demand import Asked, Share, demand
    from async_rl.cluster.slurm import seconds_of
    from async_rl.config import Settings, load_settings

    _check_options(arguments)

    def load(words: Sequence[str]) -> Settings:
        return load_settings(arguments.config, words)

    run = demand(
        Asked(
            config=str(arguments.config),
            words=tuple(arguments.overrides),
            written_by=shlex.join(["async-rl", *sys.argv[1:]]),
            generators=arguments.generators or 0,
            generator=Share(
                gpus=arguments.gpus_per_generator or 0, cpus=arguments.cpus or 0, memory_gb=arguments.memory or 0
            ),
            trainer=Share(gpus=0, cpus=arguments.trainer_cpus or 0, memory_gb=arguments.trainer_memory or 0),
            trainer_nodes=arguments.trainer_nodes or 1,
            time_s=seconds_of(arguments.time) if arguments.time else 0,
        ),
        load,
    )
    path = arguments.output or Path(f"{run.name}.{'sbatch' if arguments.cluster == SLURM else 'yaml'}")
    if path.exists():
        raise UserError(f"{path} exists, and you may have changed it; name another file with --output, or remove it")
    if arguments.cluster == SLURM:
        from async_rl.cluster.slurm import Queue, slurm_script

        queue = Queue(partition=arguments.partition or "", account=arguments.account or "")
        text = slurm_script(run, queue, file=str(path), relays=bool(arguments.relay))
        start = f"sbatch {path}"
    else:
        from async_rl.cluster.kubernetes import STORAGE, Place, kubernetes_manifests

        place = Place(
            image=arguments.image or "",
            namespace=arguments.namespace or "",
            claims=tuple(arguments.claim or ()),
            storage=arguments.storage or STORAGE,
        )
        text = kubernetes_manifests(run, place, arguments.config.read_text(), file=str(path))
        start = f"the commands at its top, then kubectl apply -f {path}"
    path.write_text(text)
    for note in run.notes:
        print(f"note: {note}")
    print(f"{path}: {run.generators} generators and the trainer; start it with {start}")
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option of the other cluster, and for a number that is none."""
    other = KUBERNETES if arguments.cluster == SLURM else SLURM
    for name in OWN[other]:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for {other}; leave it out")
    for name in (*(name for name, _, _ in NUMBERS), "trainer-nodes"):
        value = getattr(arguments, name.replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
