"""What a run asks of a cluster: how many processes, what each takes, and which settings follow from being spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from async_rl.config import Settings
from async_rl.config.derived import shares_gpus, tensor_parallel
from async_rl.errors import UserError

GPU_CPUS, CPU_CPUS = 8, 4
"""CPUs of a process that has a GPU, and of one that has none and whose number of threads the run chooses"""
RUN_CPUS = 2
"""of the buffer, the weight server and the launcher together"""
ONE_MACHINE = 8
"""GPUs or processes that a single machine commonly holds"""
PORT_OF_CHECK = "tcp://0.0.0.0:5555"

Load = Callable[[Sequence[str]], Settings]
"""the settings of the config and the command line, with further `name=value` words laid over them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one part of a run takes of a node. Example: `Share(gpus=1, cpus=8, memory_gb=64)`."""

    gpus: int
    cpus: int
    memory_gb: int
    """0: what the cluster gives by default"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user asked for; 0 or empty where nothing was said."""

    config: str
    words: tuple[str, ...] = ()
    """settings of the command line"""
    written_by: str = ""
    """the command line itself"""
    generators: int = 0
    generator: Share = Share(gpus=0, cpus=0, memory_gb=0)
    trainer: Share = Share(gpus=0, cpus=0, memory_gb=0)
    """of each node of the trainer; its GPUs follow from trainer.ranks"""
    trainer_nodes: int = 1
    time_s: int = 0
    """0: no limit of our own"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Example: `demand(asked, lambda words: load_settings("c.yaml", words))`."""

    asked: Asked
    settings: Settings
    """of the run, spread"""
    words: tuple[str, ...]
    """`name=value` for `async-rl run`, besides endpoints and keys"""
    generators: int
    generator: Share
    """of each"""
    trainer: Share
    """of each node of the trainer; the first one also holds buffer, weight server and launcher"""
    notes: tuple[str, ...]
    """for the user"""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def ranks_per_node(self) -> int:
        return self.settings.trainer.ranks // self.asked.trainer_nodes

    @property
    def grace_s(self) -> int:
        """Whole seconds that the last step and its checkpoint may take."""
        return math.ceil(self.settings.checkpoint.grace_s)


def demand(asked: Asked, load: Load) -> Demand:
    """What the run asks for. Raises UserError for a setting or a number that does not fit."""
    here = load(asked.words)
    number = asked.generators or here.generator.count
    if number < 1:
        raise UserError("the config starts no generators (generator.count=0); say how many with --generators")
    laid, notes = _laid(asked, here)
    words = (*asked.words, *laid)
    settings = load((*words, f"wire.endpoint={PORT_OF_CHECK}", "wire.keys=keys"))
    _check_trainer(asked, settings)
    gpus = tensor_parallel(settings) if settings.generator.device.startswith("cuda") else 0
    ranks = settings.trainer.ranks // asked.trainer_nodes
    rank_gpus = ranks if settings.trainer.device.startswith("cuda") else 0
    return Demand(
        asked=asked,
        settings=settings,
        words=words,
        generators=number,
        generator=Share(
            gpus=gpus,
            cpus=asked.generator.cpus or _cpus(settings.generator.threads, gpus) + settings.generator.task_processes,
            memory_gb=asked.generator.memory_gb,
        ),
        trainer=Share(
            gpus=rank_gpus,
            cpus=asked.trainer.cpus or ranks * _cpus(settings.trainer.threads, min(rank_gpus, 1)) + RUN_CPUS,
            memory_gb=asked.trainer.memory_gb,
        ),
        notes=(*notes, *_small(number, gpus, settings)),
    )


def _cpus(threads: int, gpus: int) -> int:
    return threads or (GPU_CPUS * gpus if gpus else CPU_CPUS)


def _laid(asked: Asked, here: Settings) -> tuple[list[str], list[str]]:
    """(settings that follow from being spread, notes about them)."""
    words, notes = ["generator.count=0"], []
    for name in ("generator", "trainer"):
        device, gpus = getattr(here, name).device, getattr(here, name).gpus
        if ":" in device:
            raise UserError(
                f"{name}.device is {device}: on a cluster the scheduler says which GPU a process gets; set "
                f"{name}.device=cuda"
            )
        if gpus:
            words.append(f"{name}.gpus=''")
            notes.append(f"{name}.gpus={gpus} is left out: the scheduler chooses GPUs")
    if shares_gpus(here):
        words.append("trainer.memory_share=1")
        notes.append(
            f"trainer.memory_share={here.trainer.memory_share:g} becomes 1: no generator is on the trainer's GPU any "
            "more; vllm.memory_share may be raised, too"
        )
    if here.weights.transport not in ("auto", "stream"):
        words.append("weights.transport=auto")
        notes.append(f"weights.transport={here.weights.transport} becomes auto: weights go over the network")
    if asked.trainer_nodes > 1 and here.trainer.start != "external":
        words.append("trainer.start=external")
    words += _split(asked.generator.gpus, here)
    return words, notes


def _split(gpus: int, here: Settings) -> list[str]:
    """What `--gpus-per-generator` sets. Raises UserError where a generator cannot use so many."""
    on_gpus = here.generator.device.startswith("cuda")
    if not gpus or (on_gpus and gpus == tensor_parallel(here)):
        return []
    if not on_gpus:
        raise UserError(
            f"--gpus-per-generator is {gpus}, but generator.device is {here.generator.device}; leave it out"
        )
    if here.generator.engine != "vllm":
        raise UserError(
            f"--gpus-per-generator is {gpus}, but the embedded engine uses one; leave it out, or set "
            "generator.engine=vllm, which splits a model over several"
        )
    return [f"vllm.tensor_parallel={gpus}"]


def _check_trainer(asked: Asked, settings: Settings) -> None:
    nodes, ranks = asked.trainer_nodes, settings.trainer.ranks
    if nodes < 1 or ranks % nodes:
        raise UserError(
            f"--trainer-nodes is {nodes}, over which trainer.ranks={ranks} cannot be spread evenly; change one of them"
        )
    if nodes == 1 and settings.trainer.start == "external":
        raise UserError(
            "trainer.start=external is for a trainer over several nodes (--trainer-nodes); on one node the run starts "
            "it itself: leave it out"
        )


def _small(generators: int, gpus: int, settings: Settings) -> list[str]:
    """A note where a single machine would do."""
    if settings.trainer.device.startswith("cuda") or gpus:
        number = generators * gpus + settings.trainer.ranks * settings.trainer.device.startswith("cuda")
        what = f"{number} GPU{'s' * (number != 1)}"
    else:
        number = generators + settings.trainer.ranks
        what = f"{number} processes without GPUs"
    if number > ONE_MACHINE:
        return []
    return [
        f"the run takes {what} in all: one machine that has them needs no cluster, `async-rl run` with "
        f"generator.count={generators} starts everything there"
    ]
