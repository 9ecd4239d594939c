"""How much likelier than when it was sampled each token of a few trajectories is now: ratios to weights that a
checkpoint still holds. The run stores what generators said, not the trainer's log-probs, so they are computed
anew here, for the trajectories shown and within a time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from async_rl.errors import UserError
from async_rl.observe.record import RunRecord
from async_rl.trainer.manifest import list_checkpoints, version_of
from async_rl.trajectory import Trajectory

BUDGET_S = 3.0
"""after which no further trajectories are computed (loading torch not counted)"""
PORTION_TOKENS = 4096
"""computed at once; the time is looked at between"""
MOST_BYTES = 2 << 30
"""of weight files: larger models are not loaded for a report"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """Of one trajectory."""

    version: int
    """of the weights compared with; when it is the step the trajectory was trained in, these are the ratios the
    trainer saw"""
    ratio: NDArray[np.float64]  # [policy tokens]


def checkpoints_of(record: RunRecord) -> dict[int, Path]:
    """Version to folder, of the checkpoints that are there with their weights."""
    return {version_of(p): p for p in list_checkpoints(record.folder.checkpoints) if any(p.glob("*.safetensors"))}


def ratios(
    record: RunRecord, trajectories: Sequence[Trajectory], steps: Sequence[int | None]
) -> tuple[Mapping[int, Ratios], str]:
    """Ratios by place in `trajectories`, each to the checkpoint nearest to its step (None: to the newest), and a
    sentence on what they are or why some are missing."""
    found: dict[int, Ratios] = {}
    there = checkpoints_of(record)
    if not there:
        return found, "No checkpoint holds weights, so there are no importance ratios."
    work: dict[int, list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        if trajectories[place].num_policy_tokens and not trajectories[place].failed:
            work[nearest(there, step)].append(place)
    largest = max(sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in there.values())
    if largest > MOST_BYTES:
        return found, f"The model ({largest / 2**30:.1f} GiB) is too large to compute importance ratios for a report."
    try:
        found = _computed(there, work, trajectories)
    except (UserError, OSError, ValueError, RuntimeError, ImportError) as error:
        return found, f"Importance ratios could not be computed: {error}"
    missing = sum(map(len, work.values())) - len(found)
    late = f" {missing} trajectories have none: {BUDGET_S:g} s were over." if missing else ""
    return found, (
        "Ratios are computed for this page, of the checkpoint nearest to the step a trajectory was trained in to "
        f"the policy that sampled it.{late}"
    )


def nearest(there: Mapping[int, Path], step: int | None) -> int:
    """The version to compare with: weights of version `step` are those that step `step` updated."""
    return max(there) if step is None else min(there, key=lambda version: (abs(version - step), version))


def _computed(
    there: Mapping[int, Path], work: Mapping[int, Sequence[int]], trajectories: Sequence[Trajectory]
) -> dict[int, Ratios]:
    import torch

    from async_rl.batch import pack_batch
    from async_rl.model.folder import load_model
    from async_rl.trainer.forward import Arithmetic, batch_log_probs

    found: dict[int, Ratios] = {}
    deadline = time.monotonic() + BUDGET_S
    for version in sorted(work, key=lambda v: (-len(work[v]), v)):
        if time.monotonic() > deadline:
            break
        model = load_model(there[version])
        for places in _portions(work[version], trajectories):
            if time.monotonic() > deadline:
                break
            chosen = [trajectories[place] for place in places]
            packed = pack_batch(chosen, micro_batch_tokens=PORTION_TOKENS)
            with torch.no_grad():
                now = batch_log_probs(model, packed, Arithmetic(temperature=chosen[0].temperature))
            log_ratio = (now.log_prob - packed.log_behaviour).double().clamp(-20, 20).numpy()
            ends = np.cumsum([trajectory.num_policy_tokens for trajectory in chosen])[:-1]
            for place, part in zip(places, np.split(np.exp(log_ratio), ends), strict=True):
                found[place] = Ratios(version=version, ratio=part)
    return found


def _portions(places: Sequence[int], trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Places of trajectories of one temperature that fit one forward, in the order in which a batch packs them."""
    ordered = sorted(places, key=lambda p: (trajectories[p].temperature, trajectories[p].group, trajectories[p].sample))
    portions: list[list[int]] = []
    for place in ordered:
        one = trajectories[place]
        last = portions[-1] if portions else []
        full = sum(len(trajectories[p].tokens) for p in last) + len(one.tokens) > PORTION_TOKENS
        if not last or full or trajectories[last[0]].temperature != one.temperature:
            portions.append(last := [])
        last.append(place)
    return portions
