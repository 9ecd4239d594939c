"""Trains again on the batches that a run stored: from the same start they must give the same weights.

They do bit for bit on the same machine with the same settings and versions of libraries and of this program; a CPU of
another kind, another number of threads, a GPU or sums formed in another order may round differently.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from async_rl.buffer.store import StoreReader
from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.events import RunResumed
from async_rl.instruments.retraining import Retraining
from async_rl.objective.own import check_recorded
from async_rl.run.inputs import read_inputs
from async_rl.run.placement import threads_here
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.build import make_learner
from async_rl.trainer.checkpoint import load_checkpoint
from async_rl.trainer.learner import Learner
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of
from async_rl.trainer.packing import pack_step
from async_rl.trainer.team import weights_checksum, weights_hash
from async_rl.trajectory.codec import unpack
from async_rl.version import __version__

MICRO_BATCH = "trainer.micro_batch_tokens"
MARKS: dict[str, Callable[[Mapping[str, Tensor], str], str]] = {
    "hash": weights_hash,
    "checksum": lambda weights, _: weights_checksum(weights),
}
"""what a run records of its weights: the hash at checkpoints, after each step of a small model a checksum"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The first version at which a replay has other weights than the run had."""

    version: int
    recorded: str
    replayed: str
    last_equal: int
    """newest version before it at which both were compared and equal; -1: none"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The result of a replay."""

    version: int
    """version of the last weights = training steps done again"""
    hash: str
    """of the last weights, over the bytes of all parameters"""
    compared: int
    """versions of which the run had recorded a hash or checksum, the initial one included"""
    difference: Divergence | None
    """None: every compared version is equal, bit for bit"""
    seconds: float
    begun: int = 0
    """version that the replay began with; above 0 it is a checkpoint's, because the batches before are deleted"""


def replay(
    folder: RunFolder, *, until: int | None = None, each_step: Callable[[int], None] = lambda _: None
) -> Replayed:
    """Train on the stored batches, up to the last step of the run or to version `until`, and compare the weights with
    weights.jsonl. The replay begins with the initial model, or with the oldest checkpoint where buffer.keep_steps has
    deleted the batches before; it stops at the first difference.

    Raises UserError."""
    settings = folder.settings()
    check_recorded(folder.path, str(settings.recipe["name"]))
    recorded = _recorded(folder)
    trained = max((int(row["step"]) + 1 for row in read_rows(folder.metrics)), default=0)
    if until is not None and not 0 <= until <= trained:
        raise UserError(f"--until is {until}; the run in {folder.path} has trained {trained} steps")
    last = trained if until is None else until
    _check_ranks(folder, last)
    resumes = [row.event for row in folder.read_events() if isinstance(row.event, RunResumed)]
    started = time.monotonic()
    torch.set_num_threads(threads_here(settings).trainer.threads)
    with StoreReader(folder.store) as store:
        learner = make_learner(settings)
        begun = _begin(folder, store.first_step(), last, learner)
        compared, equal, difference = 0, -1, None
        with Retraining.of(folder, learner) as retraining:
            for version in range(begun, last + 1):
                if version > begun:
                    blobs = store.load_batch(version - 1)
                    if blobs is None:
                        raise UserError(f"{store.path}: the batch of step {version - 1} is not in it")
                    retraining.step(
                        pack_step(settings_at(resumes, settings, version - 1), [unpack(blob) for blob in blobs])
                    )
                    each_step(version)
                weights = learner.weights()
                marks = recorded.get(version, {})
                compared += bool(marks)
                found = {kind: MARKS[kind](weights, mark) for kind, mark in marks.items()}
                different = next((kind for kind in MARKS if marks.get(kind) != found.get(kind)), None)
                if different is not None:
                    difference = Divergence(
                        version=version, recorded=marks[different], replayed=found[different], last_equal=equal
                    )
                    break
                if marks:
                    equal = version
    return Replayed(
        version=learner.version,
        hash=weights_hash(learner.weights()),
        compared=compared,
        difference=difference,
        seconds=time.monotonic() - started,
        begun=begun,
    )


def settings_at(resumes: Sequence[RunResumed], settings: Settings, step: int) -> Settings:
    """The settings that the run trained `step` with: a resumed run may have been given another micro-batch, which
    forms sums in another order. `resumes`: events; `settings`: those the run ended with."""
    tokens = settings.trainer.micro_batch_tokens
    for resumed in reversed(resumes):
        if resumed.version > step and (change := resumed.changed.get(MICRO_BATCH)):
            tokens = change[0]
    return replace(settings, trainer=replace(settings.trainer, micro_batch_tokens=tokens))


def _check_ranks(folder: RunFolder, last: int) -> None:
    """Raises UserError where several ranks took a step that would be done again."""
    over_ranks = [int(row["step"]) for row in read_rows(folder.metrics) if "ranks/step_skew" in row]
    if over_ranks and over_ranks[0] < last:
        before = f"`replay --until {over_ranks[0]}` does the steps before it, " if over_ranks[0] else ""
        raise UserError(
            f"{folder.path}: step {over_ranks[0]} was trained by several ranks (trainer.ranks), which form their sums "
            "in another order than the one process of a replay: the weights would differ in their last bits; "
            f"{before}`rescore` works on any run"
        )


def _begin(folder: RunFolder, first_step: int, last: int, learner: Learner) -> int:
    """Load the state where a replay can begin, and return its version. Raises UserError where there is none."""
    if first_step == 0:
        return 0
    whole = [path for path in list_checkpoints(folder.checkpoints) if damage_of(path) is None]
    able = [path for path in whole if first_step <= version_of(path) <= last]
    if not able:
        there = ", ".join(str(version_of(path)) for path in whole) or "none"
        raise UserError(
            f"{folder.path}: the batches of steps before {first_step} are deleted (buffer.keep_steps="
            f"{folder.settings().buffer.keep_steps}), so a replay up to version {last} must begin with a checkpoint "
            f"of version {first_step} to {last}; whole checkpoints: {there}"
        )
    load_checkpoint(able[0], learner)
    return version_of(able[0])


def _recorded(folder: RunFolder) -> dict[int, dict[str, str]]:
    """Version -> kind of mark -> mark."""
    found: dict[int, dict[str, str]] = {}
    for row in read_rows(folder.weights):
        found.setdefault(int(row["version"]), {}).update({kind: str(row[kind]) for kind in MARKS if kind in row})
    return found


def describe_replay(result: Replayed, folder: RunFolder) -> str:
    """The result, for the terminal."""
    head = f"{folder.path}: {result.version - result.begun} steps trained again in {result.seconds:.1f} s"
    if result.begun:
        head += (
            f", from the checkpoint of version {result.begun} on: of the batches before, trajectories are deleted "
            "(buffer.keep_steps)"
        )
    weights = f"weights of version {result.version}: {result.hash}"
    if result.difference is None:
        same = (
            f"identical to the run at all {result.compared} versions it recorded"
            if result.compared
            else ("the run recorded no hash to compare with")
        )
        return f"{head}\n{weights}\n{same}"
    d = result.difference
    if d.version == 0:
        where = "the initial model is not the one the run began with (see model.path)"
    elif d.version == result.begun:
        where = f"the checkpoint of version {d.version} does not hold the weights that the run recorded"
    elif d.last_equal == d.version - 1:
        where = f"the first difference arises in training step {d.version - 1}"
    else:
        where = f"the first difference arises in one of the training steps {d.last_equal} to {d.version - 1}"
    said = f"{head}\n{weights}\nNOT identical: {where}; the run recorded {d.recorded} for version {d.version}"
    inputs = read_inputs(folder.inputs)
    program = (inputs.program if inputs is not None else "") or "0.3.0 or older"
    if program == __version__:
        return said
    return (
        f"{said}\nthe run was begun by async_rl {program}, this is {__version__}: another version may round differently"
    )
