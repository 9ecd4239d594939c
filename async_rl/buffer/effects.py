"""What the state machine asks the process around it to do, in order. Writes are committed before anything is sent, so
whatever a peer was told is in the store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from async_rl.buffer.ledger import Group
from async_rl.buffer.sampler import Decision
from async_rl.buffer.sampler_statistics import Outcome
from async_rl.events import Event
from async_rl.trajectory import Split, Trajectory
from async_rl.trajectory.codec import Blob
from async_rl.trajectory.reuse import Drawn
from async_rl.wire.messages import BufferCounters, EvaluationResult, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class AddGroup:
    """Store a group that was admitted."""

    group: int
    problem: int
    split: Split
    admitted_version: int
    admitted_at: float
    generator: str
    position: int
    """in the prompt order; -1: none (evaluation)"""
    attempt: int
    """how often a group of this position was dropped before"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddDecision:
    """Store what the sampler chose for a group, with the tokens that its answers start from."""

    group: int
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class AddOutcome:
    """Store what came of a group that the sampler had chosen."""

    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class AddTrajectories:
    """Store finished trajectories."""

    trajectories: Sequence[Trajectory]
    blobs: Sequence[Blob]
    """their bytes as they arrived; empty: not at hand"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddDropped:
    """Store, for the record, what still arrived of groups that were dropped while they ran: refused as their groups."""

    trajectories: Sequence[Trajectory]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTurns:
    """Store the finished turns of running episodes, each in place of what was saved of it before."""

    trajectories: Sequence[Trajectory]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTurns:
    """Delete the saved turns of these episodes: they are finished."""

    pairs: Sequence[tuple[int, int]]
    """(group, sample)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTurns:
    """Load the saved turns of these episodes and send them."""

    peer: bytes
    pairs: Sequence[tuple[int, int]]
    """(group, sample)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseGroup:
    """Mark a group as one that will not be trained; it stays in the store with the reason."""

    group: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FormBatch:
    """Store which groups are the batch of a step."""

    step: int
    groups: tuple[int, ...]
    """in the batch's order"""
    formed_at: float
    """seconds, the buffer's clock"""
    drawn: Drawn = Drawn()
    """what of the pool is in it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkTrained:
    """Mark the batch of `step` as trained: weights of version `step + 1` exist."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkConsumed:
    """Note that weights of version `step + 1` are in a checkpoint: steps up to here are not trained again."""

    step: int
    oldest: int
    """version of the oldest checkpoint that is kept"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remember:
    """Store a small value that a restarted buffer needs, in place of what was stored under its key."""

    key: str
    value: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """Delete some payloads that nothing needs any more."""

    keep_steps: int
    """batches that stay, of those that are in a checkpoint"""
    oldest_live: int
    """lowest number of a group that is not finished with"""
    pool: Collection[tuple[int, int]]
    """(group, sample) that may come back"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddEvaluation:
    """Store the result of a complete evaluation."""

    result: EvaluationResult
    finished_at: float
    """seconds, the buffer's clock"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message."""

    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class SendBatch:
    """Load the batch of this step from the store and send it, or as much of it as may be in memory."""

    peer: bytes
    step: int
    after: int = 0
    """trajectories of it that were sent before"""
    counters: BufferCounters
    """without the store's numbers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRefusal:
    """Record an example of what was not taken."""

    peer: bytes
    what: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """An event for the record of the run."""

    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRun:
    """End the run. `failed`: with an error."""

    reason: str
    failed: bool


# fmt: off
Write = (
    AddGroup | AddDecision | AddOutcome | AddTrajectories | AddDropped | SaveTurns | DropTurns | RefuseGroup
    | FormBatch | MarkTrained | MarkConsumed | Remember | Prune | AddEvaluation
)
# fmt: on
Effect = Write | Send | SendTurns | SendBatch | RecordRefusal | Note | EndRun


def add_group(group: Group, generator: str) -> AddGroup:
    """The effect of an admission. `generator`: name of the one that holds it; empty: none."""
    return AddGroup(
        group=group.group,
        problem=group.problem,
        split=group.split,
        admitted_version=group.admitted_version,
        admitted_at=group.admitted_at,
        generator=generator,
        position=group.position,
        attempt=group.attempt,
    )
