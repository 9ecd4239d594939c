"""`async-rl train`: a rank of the trainer of a run that waits for it (`trainer.start=external`).

Who waits for whom: it waits for the run to be launched, and for the other ranks, by deadline. Rank 0 must be on the
run's host: generators map the weights it publishes. Every rank needs the run's folder, where checkpoints go.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_rl import __version__
from async_rl.errors import UserError
from async_rl.join.place import awaited_trainer, launched_by
from async_rl.join.rank_environment import rank_environment
from async_rl.launch.child import arithmetic_environment
from async_rl.launch.preflight import check_device
from async_rl.run_folder import RunFolder
from async_rl.settings import Settings
from async_rl.wire.host import this_host


def train_for(run: Path) -> None:
    """Be a rank until the run is done; ends this process. Raises UserError when it cannot take part."""
    folder = RunFolder(run.absolute())
    if not folder.config.is_file():
        raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
    settings = folder.settings()
    here = rank_environment(os.environ)
    wanted = awaited_trainer(folder, settings)
    check_fit(wanted, settings, here)
    os.environ.update(here)
    # torch reads these when it is imported
    os.environ.update(arithmetic_environment(settings.trainer.threads))
    if Path(wanted["folder"]).is_dir():
        os.chdir(wanted["folder"])  # relative paths in the run's settings begin there
    check_device("trainer.device", settings.trainer.device)
    from async_rl.trainer.__main__ import main

    owner = launched_by(folder) if wanted["host"] == this_host() else 0
    main(str(folder.path), wanted["endpoint"], str(wanted["version"]), owner=owner)


def check_fit(wanted: Mapping[str, Any], settings: Settings, here: Mapping[str, str]) -> None:
    """Raises UserError unless this process is one of the ranks that the run waits for."""
    size, rank = int(here.get("WORLD_SIZE", "1")), int(here.get("RANK", "0"))
    if size != settings.trainer.ranks:
        raise UserError(
            f"{size} rank{'s' * (size != 1)} started, but the run waits for trainer.ranks={settings.trainer.ranks}; "
            f"start it so: {wanted['command']}"
        )
    if wanted["package"] != __version__:
        raise UserError(f"this is async-rl {__version__}, the run is {wanted['package']}; both need the same")
    if rank == 0 and wanted["host"] != this_host():
        raise UserError(
            "rank 0 of the trainer must run on the run's host: generators map the weights it publishes there; other "
            "ranks may be elsewhere, where they see the run's folder"
        )
