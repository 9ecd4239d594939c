"""The audit of a run that has ended: was anything lost, trained twice, too old or out of order?

Independent of the code that wrote the record: staleness is computed from the version spans of the stored tokens, the
prompt order from the seed, the rest by counting. Only definitions (settings, tables, codec) are shared.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from async_rl.buffer.build import make_sampler
from async_rl.buffer.sampler import SamplerRules
from async_rl.buffer.store_reader import BatchRow, GroupRow, StoreReader
from async_rl.config import Settings
from async_rl.config.pool import PoolSettings
from async_rl.errors import UserError
from async_rl.events import EvaluationReported, EventRow, GeneratorQuarantined
from async_rl.observe.audit_pool import audit_pool
from async_rl.observe.audit_sampler import check_decisions
from async_rl.observe.audit_versions import Versions, versions_by_step
from async_rl.observe.audit_windows import audit_pieces
from async_rl.run_folder import Rollback, RunFolder, read_rollback, read_rows
from async_rl.task import Task, make_task
from async_rl.task.order import PromptOrder
from async_rl.task.problem_fields import read_sources
from async_rl.trainer.manifest import damage_of, list_checkpoints, version_of

Kind = Literal[
    "lost", "duplicated", "stale", "order", "decision", "batch", "pool", "evaluation", "checkpoint", "record",
    "fabricated",
]  # fmt: skip
"""lost: admitted or stored, but in no batch, not refused and not to come; duplicated: in two batches, or both trained
and refused; stale: a token beyond max_staleness; order: a gap in the prompt order; decision: a group that the sampler
would not have chosen; batch: not formed exactly once, or not of `groups_per_step` groups; pool: came back beyond its
own bounds, changed, or otherwise than the stored batches prescribe; fabricated: trained although its generator was
known to lie; the others name the thing that is not whole"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """Something that must not be in the record of a run."""

    kind: Kind
    what: str
    """which group, step or file, and the evidence"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What must hold of a run with these settings."""

    groups_per_step: int
    group_size: int
    """trajectories"""
    max_staleness: int
    """steps"""
    most_waiting: int
    """groups that may be neither trained nor refused: as many as there are slots"""
    problem_at: Callable[[int], int]
    """the prompt order: position -> problem"""
    pool: PoolSettings = PoolSettings()
    seed: int = 0
    """of the run"""
    sampler: SamplerRules | None = None
    """what chooses problems and sizes in its place"""
    window: int = 0
    """tokens behind which episodes are cut; 0: they are whole"""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """group -> trajectories, where the sampler chose them"""
    steps: int | None
    """training steps of a finished run; None: the run was stopped before its end"""
    evaluation_size: int
    """trajectories of one evaluation"""
    went_back: int = 0
    """the version at which the run went back; from there on no token of an older version is trained. 0: it never did"""

    def size(self, group: int) -> int:
        """Trajectories of a group."""
        return self.sizes.get(group, self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """What a generator that was proven to lie has left in the weights."""

    name: str
    lie: str
    reason: str
    trained: tuple[tuple[int, int], ...]
    """(group, step) that held trajectories of it"""

    def describe(self) -> str:
        if not self.trained:
            return f"{self.name} reported {self.lie} that are not what it did; nothing of it was trained"
        steps = [step for _, step in self.trained]
        groups = _listed(group for group, _ in self.trained[:MOST_SHOWN])
        more = f" and {len(self.trained) - MOST_SHOWN} more" if len(self.trained) > MOST_SHOWN else ""
        return (
            f"{self.name} reported {self.lie} that are not what it did; {len(self.trained)} groups with trajectories "
            f"of it were trained before that was known, in steps {min(steps)} to {max(steps)}: groups {groups}{more}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the audit of a run counted and found. A sound run has no violations."""

    groups_admitted: int
    groups_trained: int
    """groups that are in a batch"""
    groups_refused: int
    groups_waiting: int
    """groups that were admitted and were still in the pipeline at the end"""
    steps: int
    """batches formed"""
    trajectories: int
    """trajectories in batches"""
    lag_max: int
    """the largest staleness of a trained token, in steps; 0 when none was trained"""
    violations: tuple[Violation, ...]
    pieces: str = ""
    """of episodes that were trained in pieces, in words; empty: none was"""
    reused: str = ""
    """what came back from the experience pool, in words; empty: nothing did"""
    went_back: str = ""
    """in words; empty when the run never went back"""
    fabricated: tuple[Touched, ...] = ()
    """by generators that were proven to lie"""

    def count(self, kind: Kind) -> int:
        return sum(1 for violation in self.violations if violation.kind == kind)


def audit_run(folder: RunFolder) -> Audit:
    """Check everything a run has left: store, metric rows, evaluations, checkpoints.

    Raises UserError when the run still goes on, or the folder holds none."""
    RunFolder.open(folder.path)
    _refuse_running(folder)
    settings = folder.settings()
    back = read_rollback(folder)
    promise = promise_of(settings, finished=folder.summary.exists(), back=back)
    with StoreReader(folder.store) as store:
        audit = audit_store(store, promise)
        events = folder.read_events()
        violations = [*audit.violations, *_check_evaluations(store, events, promise)]
        fabricated, known = _check_liars(store, events)
        violations += known
    violations += _check_rows(folder, audit.steps, promise)
    violations += _check_checkpoints(folder, promise, back)
    went_back = "" if back is None else f"at step {back.at - 1} to version {back.to} ({back.reason})"
    return dataclasses.replace(audit, violations=tuple(violations), went_back=went_back, fabricated=tuple(fabricated))


def promise_of(settings: Settings, *, finished: bool, back: Rollback | None = None) -> Promise:
    """What must hold of a run with `settings`. `back`: that it went back to an earlier checkpoint."""
    task = make_task(settings.task.name, settings.task.args)
    batch, evaluation = settings.batch, settings.evaluation
    problems = min(evaluation.problems, len(task.problems("eval")))
    return Promise(
        groups_per_step=batch.groups_per_step,
        group_size=batch.group_size,
        max_staleness=settings.staleness.max_staleness,
        most_waiting=(settings.staleness.max_staleness + 1) * batch.groups_per_step,
        problem_at=PromptOrder(len(task.problems("train")), settings.seed),
        pool=settings.pool,
        seed=settings.seed,
        sampler=make_sampler(settings, len(task.problems("train")), _sources(settings, task)),
        window=settings.rollout.window,
        steps=settings.trainer.steps if finished else None,
        evaluation_size=problems * evaluation.samples,
        went_back=back.at if back is not None else 0,
    )


def _sources(settings: Settings, task: Task) -> Sequence[int]:
    """Number of the source of each training problem, where the sampler chooses among them."""
    return read_sources(task, settings.sampler.source_field).numbers if settings.sampler.choose == "ucb" else ()


def _refuse_running(folder: RunFolder) -> None:
    """Raise UserError when the run still goes on: a record that is being written looks torn."""
    if not folder.lock.exists():
        return
    descriptor = os.open(folder.lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder.path}: this run is still going on; audit it when it has ended") from None
    finally:
        os.close(descriptor)


def audit_store(store: StoreReader, promise: Promise) -> Audit:
    """Check the groups, batches and tokens of a store against what was promised."""
    decided = list(store.decisions())
    promise = dataclasses.replace(promise, sizes={one.group: one.decision.samples for one in decided})
    rows = list(store.groups())
    batches = list(store.batches())
    groups = {row.group: row for row in rows if row.split == "train"}
    pieces = audit_pieces(store, groups, decided, promise.window)
    other = () if promise.window else check_decisions(store, groups, decided, promise.sampler)
    violations = [
        *_check_numbers(rows),
        *_check_order(list(groups.values()), promise, pieces.before),
        *[Violation(kind="decision", what=what) for what in (*pieces.wrong, *other)],
        *_check_batches(batches, groups, promise, store.consumed_step()),
        *_check_fates(store, list(groups.values()), batches, promise),
    ]
    tokens = _TokenCheck()
    with versions_by_step(store) as stored:
        for batch in batches:
            violations += tokens.check(stored(batch.step), batch, promise)
    reused = audit_pool(store, groups, promise.pool, promise.seed)
    violations += [Violation(kind="pool", what=what) for what in reused.wrong]
    refused = sum(1 for row in groups.values() if row.refused_because is not None)
    trained = {group for batch in batches for group in batch.groups}
    return Audit(
        groups_admitted=len(groups),
        groups_trained=len(trained),
        groups_refused=refused,
        groups_waiting=sum(1 for row in groups.values() if row.refused_because is None and row.group not in trained),
        steps=len(batches),
        trajectories=tokens.trajectories,
        lag_max=max(tokens.lag_max, 0),
        violations=tuple(violations),
        reused=reused.describe(),
        pieces=pieces.describe(),
    )


# ---------------------------------------------------------------- groups and batches


def _check_numbers(rows: Sequence[GroupRow]) -> Iterator[Violation]:
    """Every group has a row: groups of training and of evaluations draw their numbers from one gapless sequence."""
    expected = 0
    for row in rows:
        for missing in range(expected, row.group):
            yield Violation(kind="lost", what=f"group {missing} was admitted and has no row in the store")
        expected = row.group + 1


def _check_order(rows: Sequence[GroupRow], promise: Promise, goes_on: Mapping[int, int]) -> Iterator[Violation]:
    """First attempts are a gapless prefix of the prompt order, and a problem is asked again only after its group was
    refused, or where its episode goes on (`goes_on`: from which group). The check stops at the first gap, because
    everything behind it is shifted."""
    begun = 0
    last: dict[int, GroupRow] = {}
    for row in rows:
        if promise.sampler is None and row.problem != (expected := promise.problem_at(max(row.position, 0))):
            yield Violation(
                kind="order",
                what=f"group {row.group} has problem {row.problem}; at its position, {row.position}, the prompt order "
                f"says {expected}",
            )
        before = last.get(row.position)
        if before is None and (row.position != begun or row.attempt != 0):
            what = f"group {row.group} is attempt {row.attempt} at position {row.position} of the prompt order"
            yield Violation(kind="order", what=f"{what}; attempt 0 at position {begun} is next")
            return
        on = before is not None and goes_on.get(row.group) == before.group
        if before is not None and not on and (before.refused_because is None or row.attempt != before.attempt + 1):
            yield Violation(
                kind="duplicated",
                what=f"groups {before.group} and {row.group} both are attempt {row.attempt} at position {row.position} "
                f"of the prompt order, or the first of them was not refused",
            )
        begun += before is None
        last[row.position] = row


def _check_batches(
    batches: Sequence[BatchRow], groups: Mapping[int, GroupRow], promise: Promise, consumed: int
) -> Iterator[Violation]:
    """Every step has one batch of exactly `groups_per_step` groups, each in one batch only and known to the store."""
    formed = Counter(batch.step for batch in batches)
    last = promise.steps if promise.steps is not None else max(formed, default=-1) + 1
    for step in sorted({*range(last), *formed}):
        if formed[step] != 1:
            yield Violation(kind="batch", what=f"the batch of step {step} was formed {formed[step]} times")
        if step >= last:
            yield Violation(kind="batch", what=f"there is a batch of step {step}, but the run has {last} steps")
    where: dict[int, list[int]] = {}
    for batch in batches:
        if len(batch.groups) != promise.groups_per_step:
            yield Violation(
                kind="batch",
                what=f"the batch of step {batch.step} has {len(batch.groups)} groups instead of "
                f"{promise.groups_per_step}",
            )
        if promise.steps is not None and batch.trained_at is None:
            yield Violation(kind="batch", what=f"the batch of step {batch.step} was never marked as trained")
        for group in batch.groups:
            where.setdefault(group, []).append(batch.step)
    for group, steps in where.items():
        if len(steps) > 1:
            yield Violation(kind="duplicated", what=f"group {group} is in the batches of steps {_listed(steps)}")
        if group not in groups:
            yield Violation(kind="lost", what=f"group {group} of step {steps[0]} has no row in the store")
        elif groups[group].step not in steps:
            yield Violation(
                kind="batch",
                what=f"group {group} is in the batch of step {steps[0]}, its own row says {groups[group].step}",
            )
    if promise.steps is not None and consumed != promise.steps - 1:
        yield Violation(
            kind="checkpoint", what=f"the store says steps up to {consumed} are in a checkpoint, of {promise.steps}"
        )


def _check_fates(
    store: StoreReader, rows: Sequence[GroupRow], batches: Sequence[BatchRow], promise: Promise
) -> Iterator[Violation]:
    """Each group is in a batch, refused with a reason, or was still in the pipeline at the end."""
    in_batches = {group for batch in batches for group in batch.groups}
    waiting: list[GroupRow] = []
    for row in rows:
        if row.group in in_batches:
            if row.refused_because is not None:
                yield Violation(
                    kind="duplicated",
                    what=f"group {row.group} is in a batch and also refused ({row.refused_because})",
                )
        elif row.refused_because is not None:
            if not row.refused_because.strip():
                yield Violation(kind="lost", what=f"group {row.group} was refused without a reason")
        elif row.step is not None:
            yield Violation(kind="lost", what=f"group {row.group} has step {row.step}, but is not in that batch")
        else:
            waiting.append(row)
    for place, row in enumerate(waiting):
        last = _last_step_of(store, row, promise)
        if last < len(batches):
            yield Violation(
                kind="lost",
                what=f"group {row.group} is neither trained nor refused; begun with weights {row.admitted_version}, it "
                f"had to be by step {last}, and there are {len(batches)}",
            )
        elif place >= promise.most_waiting:
            yield Violation(
                kind="lost",
                what=f"group {row.group} is neither trained nor refused; at most {promise.most_waiting} groups can "
                f"be in the pipeline, and {place} older ones are",
            )


def _last_step_of(store: StoreReader, row: GroupRow, promise: Promise) -> int:
    """The last step that may train a group: `max_staleness` after the version of its oldest token. That version is
    known once all samples are stored; until then the version the group was admitted with stands for it."""
    found = list(store.trajectories_of(row.group))
    versions = [t.version_min for t in found if t.version_min >= 0]
    oldest = min(versions) if versions and len(found) >= promise.size(row.group) else row.admitted_version
    return max(oldest, row.admitted_version) + promise.max_staleness


# ---------------------------------------------------------------- tokens


@dataclass(slots=True)
class _TokenCheck:
    """Checks batch after batch what they hold, token by token, and counts it."""

    trajectories: int = 0
    lag_max: int = -1
    seen: set[tuple[int, int]] = field(default_factory=set)
    """(group, sample)"""

    def check(self, stored: Iterable[Versions | str], batch: BatchRow, promise: Promise) -> Iterator[Violation]:
        """Check one batch. `stored`: its trajectories; a text: one that cannot be read."""
        samples: dict[int, Counter[int]] = {group: Counter() for group in batch.groups}
        for one in stored:
            if isinstance(one, str):
                yield Violation(kind="lost", what=one)
                continue
            self.trajectories += 1
            samples.setdefault(one.group, Counter())[one.sample] += 1
            if one.oldest < 0:
                continue
            self.lag_max = max(self.lag_max, batch.step - one.oldest)
            name = f"sample {one.sample} of group {one.group}, trained at step {batch.step},"
            if batch.step - one.oldest > promise.max_staleness:
                yield Violation(
                    kind="stale",
                    what=f"{name} has tokens of version {one.oldest}: {batch.step - one.oldest} steps old, at most "
                    f"{promise.max_staleness} are allowed",
                )
            if one.oldest < promise.went_back <= batch.step:
                yield Violation(
                    kind="stale",
                    what=f"{name} has tokens of version {one.oldest}, though the run went back at version "
                    f"{promise.went_back}: the weights that sampled them were given up",
                )
            if one.newest > batch.step:
                yield Violation(kind="stale", what=f"{name} has tokens of version {one.newest}, which came after it")
        yield from self._check_samples(samples, batch, promise)

    def _check_samples(
        self, samples: Mapping[int, Counter[int]], batch: BatchRow, promise: Promise
    ) -> Iterator[Violation]:
        """Each group of the batch has each of its samples once."""
        for group, found in samples.items():
            missing = [sample for sample in range(promise.size(group)) if not found[sample]]
            if missing:
                yield Violation(
                    kind="lost", what=f"group {group} of step {batch.step} lacks its samples {_listed(missing)}"
                )
            for sample, times in found.items():
                if times > 1 or sample >= promise.size(group) or (group, sample) in self.seen:
                    yield Violation(
                        kind="duplicated",
                        what=f"sample {sample} of group {group} is trained at step {batch.step} and once more",
                    )
                self.seen.add((group, sample))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# ---------------------------------------------------------------- files beside the store


def _check_evaluations(store: StoreReader, events: Sequence[EventRow], promise: Promise) -> Iterator[Violation]:
    """Evaluations are numbered without a gap, reported once and whole; there is one at the start and one at the end."""
    reported = [row.event for row in events if isinstance(row.event, EvaluationReported)]
    times = Counter(event.evaluation for event in reported)
    stored = {row.evaluation: row for row in store.evaluations()}
    for number in range(max(times, default=-1) + 1):
        if times[number] != 1:
            yield Violation(kind="evaluation", what=f"evaluation {number} was reported {times[number]} times")
        elif number not in stored:
            yield Violation(kind="evaluation", what=f"evaluation {number} was reported and is not in the store")
    for number, row in stored.items():
        if len(row.rewards) != promise.evaluation_size:
            yield Violation(
                kind="evaluation",
                what=f"evaluation {number} has {len(row.rewards)} trajectories instead of {promise.evaluation_size}",
            )
    if promise.steps is not None:
        steps = [event.step for event in reported]
        for step, when in ((0, "before training"), (promise.steps, "after the last step")):
            if step not in steps:
                yield Violation(kind="evaluation", what=f"there is no evaluation {when}")


def _check_liars(store: StoreReader, events: Sequence[EventRow]) -> tuple[list[Touched], list[Violation]]:
    """What generators that were proven to lie have touched; nothing of it may be in a batch that was formed later."""
    found: list[Touched] = []
    violations: list[Violation] = []
    for row in events:
        if not isinstance(event := row.event, GeneratorQuarantined):
            continue
        trained = store.trained_of(event.name, begun_before=row.time)
        known = {(touched.name, pair) for touched in found for pair in touched.trained}
        fresh = tuple(pair for pair in trained if (event.name, pair) not in known)
        found.append(Touched(name=event.name, lie=event.lie, reason=event.reason, trained=fresh))
        violations += [
            Violation(
                kind="fabricated",
                what=f"group {group} with trajectories of {event.name} is in the batch of step {step}, though the "
                f"generator was quarantined before step {event.step}",
            )
            for group, step in fresh
            if step >= event.step
        ]
    return found, violations


def _check_rows(folder: RunFolder, formed: int, promise: Promise) -> Iterator[Violation]:
    """There is one metric row a step, in order, and at most one hash and one checksum a version."""
    steps = [int(row["step"]) for row in read_rows(folder.metrics)]
    last = promise.steps if promise.steps is not None else min(formed, len(steps))
    times = Counter(steps)
    for step in sorted({*range(last), *times}):
        if times[step] != 1 or step >= last:
            yield Violation(kind="record", what=f"{folder.metrics.name} has step {step} {times[step]} times")
    if any(second < first for first, second in pairwise(steps)):
        yield Violation(kind="record", what=f"{folder.metrics.name} is not in the order of the steps")
    marks = Counter(
        (int(row["version"]), kind) for row in read_rows(folder.weights) for kind in ("hash", "checksum") if kind in row
    )
    for (version, kind), count in marks.items():
        if count > 1:
            what = f"{folder.weights.name} has the {kind} of version {version} {count} times"
            yield Violation(kind="record", what=what)
    if promise.steps is not None and marks[promise.steps, "hash"] == 0:
        yield Violation(kind="record", what=f"{folder.weights.name} has no hash of the last weights")


def _check_checkpoints(folder: RunFolder, promise: Promise, back: Rollback | None) -> Iterator[Violation]:
    """Every checkpoint is byte for byte what was written, and the last one is there. No checkpoint of a finished run
    holds weights that were given up."""
    found = list_checkpoints(folder.checkpoints)
    for path in found:
        if back is not None and promise.steps is not None and back.to < version_of(path) < back.at:
            yield Violation(
                kind="checkpoint", what=f"{path.name} holds weights that were given up at step {back.at - 1}"
            )
        if (damage := damage_of(path)) is not None:
            yield Violation(kind="checkpoint", what=f"{path.name}: {damage}")
    if promise.steps is not None and promise.steps not in map(version_of, found):
        yield Violation(kind="checkpoint", what=f"there is no checkpoint of the last version, {promise.steps}")


# ---------------------------------------------------------------- in words

MOST_SHOWN = 20
"""violations of one kind, or groups of one liar, that are printed"""


def audit_rows(audit: Audit) -> list[tuple[str, str]]:
    """The audit as (name, value) rows of a table."""
    return [
        ("groups", f"{audit.groups_admitted} admitted, {audit.groups_trained} trained, {audit.groups_refused} refused, "
                   f"{audit.groups_waiting} in the pipeline at the end"),
        ("batches", f"{audit.steps}, {audit.trajectories} trajectories"),
        ("staleness", f"{audit.lag_max} steps at most"),
        *([("pieces", audit.pieces)] if audit.pieces else []),
        *([("pool", audit.reused)] if audit.reused else []),
        *([("went back", audit.went_back)] if audit.went_back else []),
        ("lost", str(audit.count("lost"))),
        ("duplicated", str(audit.count("duplicated"))),
        *[("fabricated", touched.describe()) for touched in audit.fabricated],
    ]  # fmt: skip


def describe_violations(violations: Iterable[Violation]) -> list[str]:
    """One line a violation, kind by kind; beyond MOST_SHOWN of a kind they are only counted."""
    by_kind: dict[str, list[str]] = {}
    for violation in violations:
        by_kind.setdefault(violation.kind, []).append(violation.what)
    lines = []
    for kind, whats in by_kind.items():
        lines += [f"{kind}: {what}" for what in whats[:MOST_SHOWN]]
        if len(whats) > MOST_SHOWN:
            lines.append(f"{kind}: and {len(whats) - MOST_SHOWN} more")
    return lines
