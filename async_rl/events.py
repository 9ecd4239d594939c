"""What happens in a run, as typed events: the rows of `events.jsonl`.

A process constructs an event and hands it to `RunFolder.record`, which adds the time and appends one JSON row
`{"event": name, key: value, ..., "time": seconds}`. `EVENTS` lists every event by the name in its row;
`read_event` turns a row back into a typed event and returns None for a row of another version.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, cast

import msgspec


def _key(f: Field[Any]) -> str:
    """Of a field in the row: its name, unless that is a word of Python's own."""
    return str(f.metadata.get("key", f.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in a run. Subclasses are the events; each says in `event` what its rows are called."""

    event: ClassVar[str] = ""

    def detail(self) -> dict[str, Any]:
        """The fields by their keys in the row."""
        return {_key(f): getattr(self, f.name) for f in fields(self)}

    def row(self, time: float) -> dict[str, Any]:
        """As it stands in events.jsonl; `time`: seconds since the epoch."""
        return {"event": self.event, **self.detail(), "time": time}


RecordEvent = Callable[[Event], None]
"""writes an event into the record of the run, e.g. `RunFolder.record`"""


def ignore_event(event: Event) -> None:
    """For a process that keeps no record of its run."""


# ------------------------------------------------------------------------------------------------ the launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStarted(Event):
    """The launcher started a process of the run."""

    event: ClassVar[str] = "started"
    process: str
    """name: buffer, trainer, generator-0, ..., weights, tracker"""
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFailed(Event):
    """A process ended with an error that it could report itself."""

    event: ClassVar[str] = "failed"
    process: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFrozen(Event):
    """A process gave no sign of life for wire.frozen_after_s, and the launcher ended it."""

    event: ClassVar[str] = "process_frozen"
    name: str
    pid: int
    reason: str
    """how long it was silent, and what it did last"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessKilled(Event):
    """A process did not end in time after being told to, and was killed."""

    event: ClassVar[str] = "ended_by_force"
    process: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessesLeft(Event):
    """The trainer is done, and these processes have not ended in the time they had."""

    event: ClassVar[str] = "still_running"
    processes: tuple[str, ...]
    """names"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorDied(Event):
    """A generator, or the weight server, ended before the run did, and is started again after a pause."""

    event: ClassVar[str] = "generator_died"
    name: str
    reason: str
    restart_in_s: float
    """seconds until it is started again"""
    deaths: int
    """within generator.restart_window_s"""
    max_restarts: int
    """generator.max_restarts"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorGivenUp(Event):
    """A generator lied again after it was started anew, or may not be: the run goes on without it."""

    event: ClassVar[str] = "generator_given_up"
    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInterrupted(Event):
    """A signal stopped the run."""

    event: ClassVar[str] = "interrupted"
    signal: str
    """its name, e.g. SIGINT"""
    version: int = -1
    """of the newest checkpoint, from which a resume goes on; 0: the initial model; -1: not recorded"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDamaged(Event):
    """A resumed run left out a checkpoint because it is not whole."""

    event: ClassVar[str] = "checkpoint_damaged"
    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResumed(Event):
    """The run goes on in a new launch."""

    event: ClassVar[str] = "resumed"
    version: int
    """of the weights that it goes on from"""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """setting -> (value before, value now)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerAwaited(Event):
    """The run waits for a trainer that somebody else starts (trainer.start=external)."""

    event: ClassVar[str] = "trainer_awaited"
    endpoint: str
    """of the buffer"""
    version: int
    """of the weights that training goes on from"""
    package: str
    """version of async_rl that the run has"""
    host: str
    folder: str
    """working directory in which relative paths of the settings begin"""
    ranks: int
    command: str
    """that starts the trainer, on each of its machines"""
    weights: str = ""
    """where the weight server listens, for rank 0 on another machine; empty: there is none"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StallReported(Event):
    """A wait has lasted longer than wire.stall_report_s and two steps; reported again after twice the time."""

    event: ClassVar[str] = "stall"
    waits: str
    """who waits"""
    what: str = field(metadata={"key": "for"})
    """what it waits for"""
    seconds: float
    text: str
    """who keeps it waiting, in words"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StallOver(Event):
    """A wait that was reported is over."""

    event: ClassVar[str] = "stall_over"
    waits: str
    """who waited"""
    what: str = field(metadata={"key": "for"})
    """what it waited for"""
    seconds: float


# ------------------------------------------------------------------------------------------------ the buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferReady(Event):
    """The buffer has read its store and answers."""

    event: ClassVar[str] = "buffer_ready"
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorJoined(Event):
    """A generator that the launcher did not start has joined."""

    event: ClassVar[str] = "generator_joined"
    name: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorLeft(Event):
    """A generator said goodbye; its groups go to others."""

    event: ClassVar[str] = "generator_left"
    name: str
    groups: tuple[int, ...]
    """numbers of the groups it held"""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorLost(Event):
    """The buffer heard nothing of a generator for wire.frozen_after_s; its groups go to others."""

    event: ClassVar[str] = "generator_lost"
    name: str
    groups: tuple[int, ...]
    """numbers of the groups it held"""
    silent_s: float
    """seconds since its last message"""
    reason: str
    """what it did last"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRefused(Event):
    """An example of messages or trajectories that the buffer did not take."""

    event: ClassVar[str] = "refused"
    peer: str
    """identity of its socket, hexadecimal"""
    what: str
    """kind of message"""
    kind: str
    """of the objection"""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersTurnedAway(Event):
    """Connections came without a known key."""

    event: ClassVar[str] = "peers_turned_away"
    count: int
    """since this buffer began"""
    reasons: Mapping[str, int]
    """how often by reason"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemRefused(Event):
    """A problem crashed or froze its generators too often (generator.max_deaths): it is not asked any more."""

    event: ClassVar[str] = "problem_refused"
    split: str
    problem: int
    """its index"""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorQuarantined(Event):
    """A generator reported what it did not do (verify.*): nothing is taken from it any more."""

    event: ClassVar[str] = "generator_quarantined"
    name: str
    pid: int
    """of its process; 0: it was gone already"""
    lie: str
    """tokens, log-probs, versions, rewards or prompts"""
    reason: str
    """in words and numbers"""
    step: int
    """of the next batch"""
    groups_refused: int
    """groups with trajectories of it that were not trained yet; their problems are asked again"""
    groups_trained: int
    """groups with trajectories of it that were trained before"""
    first_step: int
    """that trained one; -1: none did"""
    last_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchHeldUp(Event):
    """A batch could have been formed, but waited for groups that grow too old otherwise."""

    event: ClassVar[str] = "held_up"
    step: int
    seconds: float
    groups: tuple[int, ...]
    """those it waited for"""
    generators: tuple[str, ...]
    """that held them; an empty name: nobody"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthChanged(Event):
    """The controller moved the depth of the pipeline. `old` and `new` are equal where a bound stops it."""

    event: ClassVar[str] = "depth"
    step: int
    """training step whose ESS led to it"""
    ess: float
    """ESS / B of that step"""
    smoothed: float
    """ESS / B, averaged since the last change"""
    old: float
    """batches"""
    new: float
    """batches"""
    reason: str


# ------------------------------------------------------------------------------------------------ generators


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorReady(Event):
    """A generator has built its engine."""

    event: ClassVar[str] = "generator_ready"
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorRejoined(Event):
    """A generator that the buffer had given up has joined again."""

    event: ClassVar[str] = "generator_rejoined"
    name: str
    episodes_dropped: int
    """that were running; others have them now"""


# ------------------------------------------------------------------------------------------------ the trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerReady(Event):
    """The trainer has loaded its model and takes batches."""

    event: ClassVar[str] = "trainer_ready"
    weights_bytes: int
    """of one version of the weights, as it is sent"""
    kernels: str
    """implementation of the loss's kernels"""
    attention: str
    """what attends among packed documents"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReported(Event):
    """An evaluation on the task's held-out problems is complete."""

    event: ClassVar[str] = "evaluation"
    evaluation: int
    """its number, from 0"""
    step: int
    """training steps done when it was asked for"""
    reward: float
    """mean over the trajectories that were judged; NaN: none was"""
    trajectories: int
    """all, those that failed included"""
    version_min: int
    """oldest weights that sampled it"""
    version_max: int
    """newest weights that sampled it"""
    failed: int = 0
    """trajectories without a reward, because their task, reward or engine failed"""
    failures: tuple[str, ...] = ()
    """the first reasons of those"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """named parts of the rewards: mean over the trajectories that have the part"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is on the disk."""

    event: ClassVar[str] = "checkpoint"
    version: int
    path: str
    seconds: float
    """that training stood still for it"""
    beside: float = 0.0
    """seconds from then until this was noted, while training went on"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """A training step changed nothing, e.g. because its gradient was not finite."""

    event: ClassVar[str] = "step_skipped"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatesStopped(Event):
    """A training step ended before its last update: the KL passed updates.kl_stop, nothing was left to learn, or the
    gradient was not finite."""

    event: ClassVar[str] = "updates_stopped"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRanOut(Event):
    """A training step did not fit into memory."""

    event: ClassVar[str] = "out_of_memory"
    step: int
    tokens: int
    """of the largest micro-batch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRaised(Event):
    """A signal of collapse crossed its limit (guard.*)."""

    event: ClassVar[str] = "alarm"
    signal: str
    """which, e.g. ess"""
    step: int
    since: int
    """first step of the sign"""
    reason: str
    """in words and numbers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchFound(Event):
    """Engine and trainer disagree more at equal weights than the recipe bears; once in a run (guard.mismatch)."""

    event: ClassVar[str] = "mismatch"
    step: int
    mismatch: float
    """kl/mismatch, median over guard.window steps; nats"""
    level: float
    """above which it is said; nats"""
    reason: str
    """in words and numbers"""
    remedy: str
    """settings to change"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRolledBack(Event):
    """The run went back to an earlier checkpoint after an alarm."""

    event: ClassVar[str] = "rollback"
    version: int
    """that the weights gone back to have from then on"""
    to: int
    """version of the checkpoint; 0: the initial model"""
    since: int
    """first step of the sign"""
    lr_scale: float
    """factor on the learning rate from then on"""
    reason: str
    text: str
    """the whole in one sentence"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryFailed(Event):
    """A generator showed that it does not sample from the weights that were published; it ends the run."""

    event: ClassVar[str] = "canary_failed"
    name: str
    """of the generator"""
    version: int
    tensors: tuple[str, ...]
    """names of those that differ"""
    max_difference: float
    """of the log-probs of the probe, nats"""
    mean_difference: float
    """nats"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySilent(Event):
    """A generator has been connected for long and never showed which weights it has."""

    event: ClassVar[str] = "canary_silent"
    name: str
    since_step: int
    """when it was first seen, or showed something last"""
    step: int
    holds: int
    """version that it says it has"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryDoubted(Event):
    """A trajectory that was verified is not what its generator says; the first one of each kind."""

    event: ClassVar[str] = "trajectory_doubted"
    name: str
    """of the generator"""
    lie: str
    """tokens, log-probs, versions, rewards or prompts"""
    step: int
    group: int
    sample: int
    reason: str
    """in words and numbers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardsNotRepeatable(Event):
    """An episode that was played again twice got two rewards: they are not compared any more in this launch."""

    event: ClassVar[str] = "rewards_not_repeatable"
    step: int
    reason: str
    """in words and numbers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLinkLost(Event):
    """A direct way of the weights to a generator was given up."""

    event: ClassVar[str] = "weights_link_lost"
    name: str
    """of the generator"""
    way: str
    """ipc or nccl"""
    reason: str


# ------------------------------------------------------------------------------------------------ beside the run


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReady(Event):
    """The weight server answers generators of other hosts."""

    event: ClassVar[str] = "weights_ready"
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerReady(Event):
    """The tracker process has opened its trackers."""

    event: ClassVar[str] = "tracker_ready"
    name: str = "tracker"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLost(Event):
    """Nothing more can be written to the standard output; the run goes on."""

    event: ClassVar[str] = "output_lost"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerFailed(Event):
    """A tracker failed; the run goes on without it."""

    event: ClassVar[str] = "tracker_failed"
    name: str
    """tensorboard, wandb, or tracker for the process of all"""
    reason: str


# fmt: off
_ALL: tuple[type[Event], ...] = (
    ProcessStarted, ProcessFailed, ProcessFrozen, ProcessKilled, ProcessesLeft, GeneratorDied, GeneratorGivenUp,
    RunInterrupted, CheckpointDamaged, RunResumed, TrainerAwaited, StallReported, StallOver,
    BufferReady, GeneratorJoined, GeneratorLeft, GeneratorLost, MessageRefused, PeersTurnedAway, BatchHeldUp,
    ProblemRefused, GeneratorQuarantined, DepthChanged, GeneratorReady, GeneratorRejoined,
    TrainerReady, EvaluationReported, CheckpointSaved, StepSkipped, UpdatesStopped, MemoryRanOut, AlarmRaised,
    MismatchFound, RunRolledBack, CanaryFailed, CanarySilent, TrajectoryDoubted, RewardsNotRepeatable, WeightsLinkLost,
    WeightsReady, TrackerReady, TrackerFailed, OutputLost,
)
# fmt: on
EVENTS: Mapping[str, type[Event]] = MappingProxyType({kind.event: kind for kind in _ALL})
"""every event, by the name in its row"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """One row of events.jsonl, read."""

    name: str
    time: float
    """seconds since the epoch; NaN: the row has none"""
    event: Event | None
    """None: not one of this version's events, or not whole"""
    row: Mapping[str, Any]


def read_event_row(row: Mapping[str, Any]) -> EventRow | None:
    """None for a row that is no event at all."""
    name, time = row.get("event"), row.get("time")
    if not isinstance(name, str):
        return None
    at = float(time) if isinstance(time, int | float) else math.nan
    return EventRow(name=name, time=at, event=read_event(row), row=row)


def read_event_rows(rows: Iterable[Mapping[str, Any]]) -> list[EventRow]:
    """The events among rows, in their order."""
    return [found for row in rows if (found := read_event_row(row)) is not None]


def read_event(row: Mapping[str, Any]) -> Event | None:
    """The typed event of a row; keys that it does not know are ignored. None where its name is not known, or a
    value is missing or of another type: rows of other versions are no errors."""
    name = row.get("event")
    if not isinstance(name, str) or name not in EVENTS:
        return None
    kind = EVENTS[name]
    values = {f.name: row[_key(f)] for f in fields(kind) if _key(f) in row}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventDescription:
    """One event, for the reference."""

    name: str
    """in its row"""
    type: str
    """name of the class"""
    meaning: str
    fields: tuple[tuple[str, str, str], ...]
    """(key in the row, type, meaning and unit); the meaning is empty where the key says it all"""


def describe_events() -> list[EventDescription]:
    """Every event in the order of `EVENTS`, with the texts that stand below its fields in this file."""
    parsed = ast.parse(inspect.getsource(sys.modules[__name__]))
    classes = {node.name: node for node in parsed.body if isinstance(node, ast.ClassDef)}
    found = []
    for name, kind in EVENTS.items():
        body = classes[kind.__name__].body
        texts = {
            cast(ast.Name, entry.target).id: inspect.cleandoc(str(below.value.value))
            for entry, below in pairwise(body)
            if isinstance(entry, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        }
        rows = tuple((_key(f), str(f.type), texts.get(f.name, "")) for f in fields(kind))
        found.append(EventDescription(name=name, type=kind.__name__, meaning=inspect.getdoc(kind) or "", fields=rows))
    return found
