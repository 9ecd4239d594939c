"""`async-rl train`: a rank of the trainer of a run that waits for it (`trainer.start=external`).

Who waits for whom: it waits for the run to be launched, and for the other ranks, by deadline. Every rank needs the
run's folder, where checkpoints go. Rank 0 may be on another machine than the run: then it reaches the buffer over TCP,
and sends its weights to the run's weight server (weights/upload.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.events import TrainerAwaited
from async_rl.process_spec import TrainerSpec
from async_rl.run.child import arithmetic_environment
from async_rl.run.join import awaited_trainer, launcher_pid
from async_rl.run.preflight import check_device
from async_rl.run.torchrun_watch import start_watch
from async_rl.run_folder import RunFolder
from async_rl.version import __version__
from async_rl.wire.endpoint import (
    as_reached_by,
    as_reached_from_here,
    is_loopback,
    is_tcp,
    require_keys,
    socket_file,
    this_host,
)
from async_rl.wire.interface import interface_variables
from async_rl.wire.keys import Keys

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""environment variables that torchrun sets for its processes"""
FIRST_PORT, NUM_PORTS = 20_000, 20_000
"""ports from which one is chosen by the number of a SLURM job"""


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this process: as they are in `environment`, or made from SLURM's (`srun`); empty for the
    only rank. MASTER_ADDR and MASTER_PORT stay where they are set. Raises UserError where variables are missing."""
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
    """The first host of SLURM's list, e.g. `gpu[007-009,12],login1` -> `gpu007`. Raises UserError for an empty list."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise UserError("SLURM_PROCID is set, but SLURM names no node; set MASTER_ADDR to the host of rank 0")
    return match[1] + (match[2] or "") + (match[3] or "")


def train_for(run: Path, connect: str = "", keys: Path | None = None) -> None:
    """Be a rank until the run is done; ends this process. `connect`: where the buffer is reached from this machine;
    empty: as the run says. `keys`: folder of this machine's keys; None: wire.keys. Raises UserError when it cannot take
    part."""
    if connect:
        socket_file(connect)  # a word that is no endpoint is refused
    folder = RunFolder.open(run.absolute())
    settings = folder.settings()
    here = rank_environment(os.environ)
    wanted = awaited_trainer(folder, settings)
    check_fit(wanted, settings, here)
    start_watch(os.environ, folder.summary)
    rank = int(here.get("RANK", "0"))
    endpoint, upload_to = reached_from_here(wanted, rank, connect)
    if is_tcp(endpoint):
        chosen = keys or Path(settings.wire.keys)
        require_keys(endpoint, Keys(chosen) if str(chosen) != "." else None)
    os.environ.update(here)
    os.environ.update(interface_variables(settings.trainer.network, os.environ))
    # torch reads these when it is imported
    os.environ.update(arithmetic_environment(settings.trainer.threads))
    if Path(wanted.folder).is_dir():
        os.chdir(wanted.folder)  # relative paths in the run's settings begin there
    check_device("trainer.device", settings.trainer.device)
    from async_rl.trainer.__main__ import main

    owner = launcher_pid(folder) if wanted.host == this_host() else 0
    spec = TrainerSpec(
        run=str(folder.path),
        name="trainer",
        endpoint=endpoint,
        version=wanted.version,
        weights_endpoint=upload_to,
        keys=str(keys.absolute()) if keys is not None else "",
    )
    main(spec, owner=owner)


def reached_from_here(wanted: TrainerAwaited, rank: int, connect: str = "") -> tuple[str, str]:
    """Where a rank reaches the buffer (empty: nowhere, which only rank 0 needs), and where rank 0 sends its weights
    (empty: it is beside the run, whose memory it shares). Raises UserError where rank 0 does not get there."""
    beside = wanted.host == this_host()
    endpoint = as_reached_from_here(connect or wanted.endpoint)
    there = beside or (is_tcp(endpoint) and (bool(connect) or not is_loopback(endpoint)))
    if rank > 0 or beside:
        return endpoint if there else "", ""
    if not there:
        raise UserError(
            f"rank 0 of the trainer is on another machine than the run, whose buffer listens at {wanted.endpoint}: "
            "give the run wire.endpoint=tcp://ADDRESS:PORT with the address of its own machine, and wire.keys; or say "
            "--connect tcp://ADDRESS:PORT here, if it listens on every interface"
        )
    if not wanted.weights:
        raise UserError(f"the run at {endpoint} has no weight server, so rank 0 must be on its machine")
    return endpoint, as_reached_by(wanted.weights, endpoint)


def check_fit(wanted: TrainerAwaited, settings: Settings, here: Mapping[str, str]) -> None:
    """Raises UserError unless this process is one of the ranks that the run waits for."""
    size = int(here.get("WORLD_SIZE", "1"))
    if size != settings.trainer.ranks:
        raise UserError(
            f"{size} rank{'s' * (size != 1)} started, but the run waits for trainer.ranks={settings.trainer.ranks}; "
            f"start it so: {wanted.command}"
        )
    if wanted.package != __version__:
        raise UserError(f"this is async-rl {__version__}, the run is {wanted.package}; both need the same")
