"""A trajectory that comes back from the experience pool, and what its `info` says of that (`Reuse`).

The stored trajectory is never changed: tokens, log-probs and versions are those of the day it was sampled. What came
back for a step is a copy under another group and sample, with these entries in `info`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from async_rl.trajectory.types import Trajectory

Source = Literal["groups", "successes", "best", "priority", "demonstrations"]
"""which query of the pool a row answers"""
SOURCES: tuple[Source, ...] = ("groups", "successes", "best", "priority", "demonstrations")
POOL_GROUPS = 1 << 40
"""groups that rows of the pool have to themselves have numbers from here on, which no fresh group reaches"""
SOURCE, _OUT = "pool/source", "pool/out"
_GROUP, _SAMPLE, _USES, _AGE = "pool/group", "pool/sample", "pool/uses", "pool/age"
_ADVANTAGE, _BASELINE, _SCALE = "pool/advantage", "pool/baseline", "pool/scale"


class Reuse(Struct, frozen=True, kw_only=True, gc=False):
    """A row of a batch that comes from the pool. A struct, which is made in a fraction of a dataclass's time: a batch
    may have hundreds."""

    source: Source
    group: int
    """of the stored trajectory; of a demonstration 0"""
    sample: int
    """of the stored trajectory; the number of a demonstration"""
    as_group: int
    """group that it is a member of in this batch: a fresh one, or one of the pool's own, from POOL_GROUPS on"""
    as_sample: int
    uses: int
    """how often it has come back, this time included"""
    age: int
    """steps between its oldest token's weights and this step; 0 for a demonstration"""
    advantage: float = 0.0
    """(reward - mean) / std in its own group, when it was fresh"""
    baseline: float = 0.0
    """median of the mean rewards of the newest groups at this step (SPEAR)"""
    scale: float = 1.0
    """median of their standard deviations; 1 where that is 0"""

    def put_on(self, trajectory: Trajectory) -> Trajectory:
        """The stored trajectory as a row of the batch."""
        said = {
            SOURCE: self.source,
            _GROUP: float(self.group),
            _SAMPLE: float(self.sample),
            _USES: float(self.uses),
            _AGE: float(self.age),
            _ADVANTAGE: self.advantage,
            _BASELINE: self.baseline,
            _SCALE: self.scale,
        }
        return replace(trajectory, group=self.as_group, sample=self.as_sample, info={**trajectory.info, **said})


def reuse_of(trajectory: Trajectory) -> Reuse | None:
    """What its `info` says; None for a fresh trajectory."""
    info = trajectory.info
    source = info.get(SOURCE)
    if source not in SOURCES:
        return None

    def number(name: str) -> float:
        return float(info.get(name, 0.0))

    return Reuse(
        source=source,
        group=int(number(_GROUP)),
        sample=int(number(_SAMPLE)),
        as_group=trajectory.group,
        as_sample=trajectory.sample,
        uses=int(number(_USES)),
        age=int(number(_AGE)),
        advantage=number(_ADVANTAGE),
        baseline=number(_BASELINE),
        scale=number(_SCALE),
    )


def without_effect(trajectory: Trajectory) -> Trajectory:
    """A fresh trajectory in whose place something of the pool is trained: it stays in the batch and counts for
    nothing."""
    return replace(trajectory, info={**trajectory.info, _OUT: 1.0})


def has_no_effect(trajectory: Trajectory) -> bool:
    """Whether `without_effect` was said of it."""
    return bool(trajectory.info.get(_OUT))


def fresh_of(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Those that did not come from the pool."""
    return [t for t in trajectories if SOURCE not in t.info]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What of the pool is in a batch."""

    rows: tuple[Reuse, ...] = ()
    """in their order behind the fresh trajectories"""
    out: tuple[tuple[int, int], ...] = ()
    """(group, sample) of the fresh trajectories that are without effect"""

    def __bool__(self) -> bool:
        return bool(self.rows)
