"""Who places the processes of a run: this machine's launcher, or a cluster's engine, as `cluster.engine` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from async_rl.cluster.ray_plan import back_to_local
from async_rl.config import Settings
from async_rl.config.schema import structured, with_overrides
from async_rl.observe.console import Console
from async_rl.run.launcher import resume_training, run_training
from async_rl.run.preflight import with_template_time
from async_rl.run.resume import resumed_settings
from async_rl.run_folder import RunFolder


def train(settings: Settings, path: Path, *, console: Console, quiet: bool = False) -> Mapping[str, Any]:
    """Run `settings` in the new run folder `path`; the summary. Raises UserError, RunFailed or Interrupted; all
    processes are gone then."""
    if settings.cluster.engine == "local":
        return run_training(settings, path, console=console)
    from async_rl.cluster.ray_run import run_on_ray

    return run_on_ray(with_template_time(settings), path, console=console, quiet=quiet)


def resume(
    path: Path, overrides: Sequence[str], *, console: Console, accepted: Sequence[str] = (), quiet: bool = False
) -> Mapping[str, Any]:
    """Go on with the run in `path`, by the engine that it had or that `overrides` choose; the summary of the whole run.
    Raises as `train` does."""
    folder = RunFolder.open(path)
    recorded = structured(Settings, folder.values(), where="")
    words = back_to_local(recorded, overrides) or list(overrides)
    chosen = with_overrides({"cluster": {"engine": recorded.cluster.engine}}, [w for w in words if _is_engine(w)])
    if chosen["cluster"]["engine"] != "ray":
        return resume_training(path, words, console=console, accepted=accepted)
    from async_rl.cluster.ray_run import resume_on_ray

    settings = resumed_settings(folder, words)
    return resume_on_ray(settings, path, words, console=console, accepted=accepted, quiet=quiet)


def _is_engine(word: str) -> bool:
    return word.startswith("cluster.engine=")
