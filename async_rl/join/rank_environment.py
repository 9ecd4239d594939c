"""Who this process is among the ranks that a launcher or a cluster's scheduler started. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from async_rl.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""what torchrun tells its processes"""
FIRST_PORT, NUM_PORTS = 20_000, 20_000


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables: as they are, or from SLURM's (`srun`), or those of the only rank. Variables that are set
    (MASTER_ADDR, MASTER_PORT) stay. Raises UserError where they do not suffice."""
    if "RANK" in environment:
        missing = [name for name in TORCHRUN if name != "LOCAL_RANK" and not environment.get(name)]
        if missing:
            raise UserError(f"RANK is set, but {', '.join(missing)} is not; start ranks with torchrun or srun")
        return {name: environment[name] for name in TORCHRUN if name in environment}
    if "SLURM_PROCID" not in environment:
        return {}
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    if size == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job = int(environment.get("SLURM_JOB_ID") or "0")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(nodes),
        # the same on every node, and another one for every job
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + job % NUM_PORTS),
    }


def first_node(nodes: str) -> str:
    """Of SLURM's list, e.g. `gpu[007-009,12],login1` -> `gpu007`. Raises UserError for an empty one."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError("SLURM_PROCID is set, but SLURM names no node; set MASTER_ADDR to the host of rank 0")
    return match[1] + (match[2] or "") + (match[3] or "")
