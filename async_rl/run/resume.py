"""Where and with which settings a run goes on after it was stopped or killed. Does not import torch.

A run resumes at the newest whole checkpoint (else at its initial model): the trainer is answered the
batches stored since, and trains them again on the same numbers. Rows of steps that are trained again are
taken out of metrics.jsonl and weights.jsonl and written anew; so are the results of evaluations the
checkpoint does not know. Everything else in events.jsonl stays: it is the story of all lives of the run.

A run that went back after an alarm (`Rollback`) begins at the version it went back at, with the weights of the
checkpoint it went back to. Nothing is trained again then: the rows of the steps that were given up stay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.buffer.store import StoreReader, store_begun
from async_rl.config import Settings, check
from async_rl.config.schema import structured, values_of, with_overrides
from async_rl.errors import RunFailed, UserError
from async_rl.events import (
    AlarmRaised,
    EvaluationReported,
    MismatchFound,
    RunRolledBack,
    StepSkipped,
    UpdatesStopped,
    read_event,
)
from async_rl.objective.own import check_recorded
from async_rl.run_folder import Rollback, RunFolder, read_rollback, read_rows, replace_text
from async_rl.trainer.manifest import Damage, list_checkpoints, newest_whole, version_of

MAY_CHANGE = (
    "trainer.steps", "checkpoint.", "wire.", "weights.", "trackers", "guard.",
    "generator.count", "generator.max_restarts", "generator.restart", "generator.gpus", "pin_threads",
    "trainer.ranks", "trainer.gpus", "trainer.sharding", "trainer.memory_share", "trainer.start",
    "trainer.nodes", "trainer.network",
    "buffer.memory_mb", "buffer.max_store_mb", "buffer.keep_steps", "cluster.",
)  # fmt: skip
"""settings that a resumed run may be given anew: none of them changes what a stored batch or a step is (over another
number of ranks its sums are formed in another order)"""
SIZES = (
    "trainer.micro_batch_tokens", "trainer.checkpoint_activations",
    "generator.max_sequences", "generator.kv_cache_mb", "vllm.memory_share", "vllm.kv_cache_mb",
)  # fmt: skip
"""what a run that lacked memory may be given as well: they change the order of sums, and so last bits"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run goes on."""

    version: int
    """of the weights; 0: the initial model"""
    checkpoint: Path | None
    damaged: tuple[Damage, ...]
    """newer checkpoints that cannot be used"""
    back: Rollback | None = None
    """the run goes back here: the weights of the checkpoint are those of `version` from now on"""

    def describe(self) -> str:
        """Example: `at step 40 from step_000040`."""
        if self.back is not None:
            return f"at step {self.version}: it went back {self.back.describe()}"
        what = self.checkpoint.name if self.checkpoint is not None else "the initial model (no checkpoint yet)"
        return f"at step {self.version} from {what}"


def resumed_settings(folder: RunFolder, overrides: Sequence[str]) -> Settings:
    """The settings of the run with `overrides`, which may change some of them. Raises UserError."""
    values = folder.values()
    before = structured(Settings, values, where="")
    settings = structured(Settings, with_overrides(values, overrides), where="")
    check(settings)
    check_recorded(folder.path, str(before.recipe["name"]))
    old = values_of(before)
    for path, value in values_of(settings).items():
        if value != old[path] and not path.startswith(MAY_CHANGE + SIZES):
            raise UserError(
                f"{path} cannot change in a resumed run: what is stored and trained so far was made with "
                f"{old[path]!r}. Only trainer.steps, trainer.ranks, checkpoint.*, wire.*, generator.count, where "
                "processes run, and sizes that memory sets (trainer.micro_batch_tokens, ...) may; else start a new run "
                f"from a checkpoint, model.path={folder.checkpoints}/step_..."
            )
    scale, back = settings.guard.rollback_lr_scale, read_rollback(folder)
    if back is not None and settings.guard.rollback and scale not in (before.guard.rollback_lr_scale, back.lr_scale):
        raise UserError(
            f"guard.rollback_lr_scale={scale:g} would do nothing: the run went back at step {back.at - 1}, once and "
            f"for all with a factor of {back.lr_scale:g} on its learning rate. Leave it out; or start a new run from a "
            f"checkpoint, model.path={folder.checkpoints}/step_..., with another optimizer.learning_rate"
        )
    fixed = settings.optimizer.schedule != "constant"
    if settings.trainer.steps != before.trainer.steps and fixed:
        raise UserError(
            f"trainer.steps cannot change in this run: its learning-rate schedule ({settings.optimizer.schedule}) "
            f"was laid out over {before.trainer.steps} steps; {_new_run(folder)}"
        )
    if folder.summary.exists():
        done = json.loads(folder.summary.read_text())["steps"]
        if settings.trainer.steps <= done:
            remedy = _new_run(folder) if fixed else f"trainer.steps={2 * done} would go on with it"
            raise UserError(f"{folder.path}: this run is finished ({done} steps); {remedy}")
    return settings


def _new_run(folder: RunFolder) -> str:
    """The remedy for a run whose number of steps is fixed."""
    newest, _ = newest_whole(folder.checkpoints, but=given_up(read_rollback(folder)))
    return "start a new run" + (f" from its last checkpoint, model.path={newest}" if newest is not None else "")


def changed(folder: RunFolder, settings: Settings) -> dict[str, tuple[Any, Any]]:
    """Setting -> (as it was in the run's folder, as it is now)."""
    old = values_of(folder.settings())
    return {path: (old[path], value) for path, value in values_of(settings).items() if value != old[path]}


def find_start(folder: RunFolder, settings: Settings) -> ResumePoint:
    """The newest whole checkpoint. Raises UserError when it lies behind the last step asked for."""
    back = read_rollback(folder)
    path, damaged = newest_whole(folder.checkpoints, but=given_up(back))
    version = version_of(path) if path is not None else 0
    rollback = back if back is not None and version == back.to else None
    version = rollback.at if rollback is not None else version
    if version > settings.trainer.steps:
        raise UserError(f"trainer.steps is {settings.trainer.steps}, but the run has done {version} steps already")
    if store_begun(folder.store):
        with StoreReader(folder.store) as store:
            first = store.first_step()
        if version < first:
            reasons = "".join(f"; {damage.path.name}: {damage.reason}" for damage in damaged)
            raise UserError(
                f"{folder.path}: no whole checkpoint from which the run could go on: the trajectories of steps before "
                f"{first} are deleted (buffer.keep_steps){reasons}. Start a new run from a model folder you trust"
            )
    return ResumePoint(version=version, checkpoint=path, damaged=tuple(damaged), back=rollback)


def start_of_rollback(folder: RunFolder, settings: Settings, begun: Sequence[int]) -> ResumePoint:
    """Where a run that goes back begins. `begun`: versions at which launches began that ended in going back; a damaged
    checkpoint is trained anew once, by a launch that begins below it. Raises RunFailed instead of a second time."""
    start = find_start(folder, settings)
    if start.back is None and begun.count(start.version) > 1:
        back = read_rollback(folder)
        assert back is not None, "the trainer ended for it"
        damages = "".join(f"; {damage.path.name}: {damage.reason}" for damage in start.damaged)
        raise RunFailed(
            f"{folder.path} cannot go back to version {back.to}: it was trained again from version {start.version} on, "
            f"and still there is no whole checkpoint of it{damages}. Look after the disk, put that checkpoint back "
            f"from a copy of the run and resume; or start a new run, model.path={folder.checkpoints}/step_..."
        )
    return start


def rewind(folder: RunFolder, start: ResumePoint) -> None:
    """Remove the rows that will be written again, the checkpoints that were given up, and the records of how the last
    launch ended. Doing it twice is the same as once."""
    version = start.version
    reported = 0
    progress: Mapping[str, Any] | None = start.back.progress if start.back is not None else None
    if progress is None and start.checkpoint is not None:
        progress = json.loads((start.checkpoint / "progress.json").read_text())
    if progress is not None:
        pending = progress["pending_evaluation"]
        reported = pending[0] if pending is not None else progress["evaluations_asked"]

    def stays(row: Mapping[str, Any]) -> bool:
        match read_event(row):
            case EvaluationReported(evaluation=number):
                return number < reported
            case StepSkipped(step=step) | UpdatesStopped(step=step):
                return step < version
            case AlarmRaised(step=step) | MismatchFound(step=step):
                return step < version
            case _:
                return True

    _keep(folder.metrics, lambda row: row["step"] < version)
    # where it goes back, the mark of the version is written at the start
    marked = version - 1 if start.back is not None else version
    _keep(folder.weights, lambda row: row["version"] <= marked)
    _keep(folder.events, stays)
    if start.back is not None:
        _record_rollback(folder, start.back)
        for path in list_checkpoints(folder.checkpoints):
            if start.back.to < version_of(path) <= start.back.at:
                shutil.rmtree(path)
    folder.summary.unlink(missing_ok=True)
    for record in folder.logs.glob("*.failure.json"):
        record.unlink()


def given_up(back: Rollback | None) -> Callable[[int], bool]:
    """Whether the checkpoint of a version holds weights that a rollback gave up."""
    return lambda version: back is not None and back.to < version < back.at


def _record_rollback(folder: RunFolder, back: Rollback) -> None:
    """Record the rollback in events.jsonl, once."""
    told = (row.event for row in folder.read_events())
    if not any(isinstance(event, RunRolledBack) and event.version == back.at for event in told):
        folder.record(back.event())


def _keep(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    if path.exists():
        replace_text(path, (json.dumps(row, allow_nan=True) + "\n" for row in read_rows(path) if wanted(row)))
