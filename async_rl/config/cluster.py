"""Settings of the engine that places and watches a run's processes: this machine alone, or a Ray cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from async_rl.config.schema import setting
from async_rl.errors import UserError

MOST_GENERATORS = 4096
_NUMBER = re.compile(r"(\d{1,5})(?:\.\.(\d{1,5}))?")


@dataclass(frozen=True)
class ClusterSettings:
    """Who places the run's processes, and what each takes (docs/scale.md)."""

    engine: Literal["local", "ray"] = setting(
        "local",
        "who places, restarts and watches the processes: the run itself on this machine, or Ray on its cluster; what "
        "they say to each other is the same",
    )
    address: str = setting(
        "auto", "of the Ray cluster, HOST:PORT; auto: the one that this machine is a node of (or RAY_ADDRESS)"
    )
    generators: str = setting(
        "",
        "generators on Ray: a number, or bounds like 4..32 within which their number follows who waits for whom; "
        "empty: generator.count",
    )
    scale_s: float = setting(
        60.0,
        "with bounds: seconds over which it is looked who waits, before generators are added or taken away",
        unit="seconds",
        min=1,
        max=86_400,
    )
    generator_gpus: float = setting(
        0.0,
        "GPUs that Ray counts for a generator, below 1 where several share one; 0: vllm.tensor_parallel, or 1",
        unit="GPUs",
        min=0,
        max=1024,
    )
    generator_cpus: float = setting(
        0.0, "CPUs that Ray counts for a generator; 0: by its threads", unit="CPUs", min=0, max=1024
    )
    generator_memory_gb: float = setting(
        0.0, "memory that Ray counts for a generator; 0: none", unit="GB", min=0, max=100_000
    )
    generator_resources: dict[str, float] = setting(
        {}, "custom resources of the cluster that a generator takes, e.g. {spot: 1}"
    )
    trainer_cpus: float = setting(
        0.0, "CPUs that Ray counts for a trainer rank; 0: by its threads", unit="CPUs", min=0, max=1024
    )
    trainer_resources: dict[str, float] = setting(
        {}, "custom resources that each node of the trainer needs; the first one also holds the buffer"
    )
    ranks_per_node: int = setting(
        0, "trainer ranks of one node; 0: all of them on one", unit="processes", min=0, max=1024
    )
    run_on: Literal["here", "anywhere"] = setting(
        "here",
        "where the buffer and the trainer's first node are: on the machine where the command is given, or wherever "
        "their resources are free; the run's folder and what the config names must then be seen there at the same path",
    )
    ship: list[str] = setting(
        [],
        "further files and folders that generators get a copy of, besides the code, data and small models that the "
        "config names: what the task imports or opens, as paths below the working folder",
    )
    grows: bool = setting(
        False,
        "the cluster adds nodes when they are asked for: what no node has now is waited for instead of refused",
    )


def bounds_of(cluster: ClusterSettings, count: int) -> tuple[int, int]:
    """(fewest, most) generators. `count`: generator.count. Raises UserError."""
    text = cluster.generators.strip()
    if not text:
        return count, count
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise UserError(f"cluster.generators is '{text}'; write a number like 8, or bounds like 4..32")
    low = int(found[1])
    high = int(found[2] or low)
    if not 1 <= low <= high <= MOST_GENERATORS:
        raise UserError(
            f"cluster.generators is '{text}'; write it as FEWEST..MOST, from 1 to {MOST_GENERATORS:,} in rising order"
        )
    return low, high
