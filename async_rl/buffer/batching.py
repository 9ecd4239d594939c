"""Complete groups become batches or are refused (`Batching`); what was dropped for its age is counted by length
(`Discarded`), so that a bias towards short episodes shows."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from async_rl.buffer import effects as do
from async_rl.buffer.admission import Admission
from async_rl.buffer.depth import DepthController, Rules
from async_rl.buffer.ledger import Group, Ledger, untrainable
from async_rl.buffer.pool import FreshGroup, Pool
from async_rl.events import BatchHeldUp
from async_rl.trajectory import Trajectory
from async_rl.trajectory.reuse import Drawn
from async_rl.trajectory.types import bucket_names, bucket_of
from async_rl.wire import messages as msg
from async_rl.wire.messages import ABANDONED

MOST_RUNNING = 4096
"""groups dropped while they ran that are remembered until the rest of them arrives"""


@dataclass(slots=True, kw_only=True)
class Lengths:
    """Policy tokens of many trajectories."""

    trajectories: int = 0
    tokens: int = 0
    buckets: Counter[int] = field(default_factory=Counter)
    """trajectories by index of their length bucket (trajectory/types.py)"""

    def add(self, policy_length: int) -> None:
        self.trajectories += 1
        self.tokens += policy_length
        self.buckets[bucket_of(policy_length)] += 1


@dataclass(slots=True, kw_only=True)
class Discarded:
    """How long the dropped, the refused and the trained episodes were. Trajectories without a policy token and failed
    ones are in no count.

    A trajectory that was dropped while it ran counts with what was generated of it: its true length is larger, and so
    is the bias.
    """

    dropped: Lengths = field(default_factory=Lengths)
    refused: Lengths = field(default_factory=Lengths)
    """groups refused for other reasons than their age"""
    trained: Lengths = field(default_factory=Lengths)
    running: OrderedDict[int, Group] = field(default_factory=OrderedDict)
    """groups dropped while they ran: a generator will still send what there is of their missing samples"""
    for_age: set[int] = field(default_factory=set)
    """of them, those dropped for their age"""

    def train(self, group: Group) -> None:
        """It is in a batch."""
        for sample in group.usable:
            if sample.policy_length:
                self.trained.add(sample.policy_length)

    def refuse(self, group: Group, *, stale: bool, owed: bool) -> None:
        """`stale`: for its age. `owed`: a generator still has its missing samples and will send what there is."""
        lengths = self.dropped if stale else self.refused
        for sample in group.usable:
            if sample.policy_length:
                lengths.add(sample.policy_length)
        if owed and group.missing:
            self.running[group.group] = group
            if stale:
                self.for_age.add(group.group)
            if len(self.running) > MOST_RUNNING:
                self.for_age.discard(self.running.popitem(last=False)[0])

    def late(self, trajectory: Trajectory) -> bool:
        """Count a trajectory of a group in `running`. False when that sample is here already."""
        group = self.running[trajectory.group]
        if not group.arrive(trajectory):
            return False
        stale = group.group in self.for_age
        if group.complete:
            del self.running[group.group]
            self.for_age.discard(group.group)
        if trajectory.num_policy_tokens and (not trajectory.failed or (stale and trajectory.reason == ABANDONED)):
            (self.dropped if stale else self.refused).add(trajectory.num_policy_tokens)
        return True

    def restore(self, lengths: Iterable[tuple[str, int, int, int]]) -> None:
        """Add what was stored: (what became of them, bucket, trajectories, policy tokens)."""
        kinds = {"dropped": self.dropped, "refused": self.refused, "trained": self.trained}
        for kind, bucket, trajectories, tokens in lengths:
            found = kinds[kind]
            found.trajectories += trajectories
            found.tokens += tokens
            found.buckets[bucket] += trajectories

    @property
    def mean_refused(self) -> float:
        """Mean policy tokens of refused trajectories, whatever the reason."""
        both = self.dropped, self.refused
        return sum(lengths.tokens for lengths in both) / max(1, sum(lengths.trajectories for lengths in both))

    def counters(self, *, groups: int) -> msg.DroppedCounters:
        """Since the start of the run. `groups`: those dropped."""
        dropped, trained = self.dropped, self.trained
        named = list(enumerate(bucket_names()))
        return msg.DroppedCounters(
            groups=groups,
            trajectories=dropped.trajectories,
            tokens=dropped.tokens,
            trajectories_trained=trained.trajectories,
            tokens_trained=trained.tokens,
            by_length={name: dropped.buckets[i] for i, name in named if dropped.buckets[i]},
            trained_by_length={name: trained.buckets[i] for i, name in named if trained.buckets[i]},
        )


@dataclass(slots=True, kw_only=True)
class HeldUp:
    """A batch that waits although P groups are finished (staleness.py, `held_up_by`)."""

    since: float
    groups: list[int]
    """it waits for"""
    generators: list[str]
    """that have them; an empty name: none has it"""


@dataclass(slots=True, kw_only=True)
class Batching:
    """What becomes of admitted groups."""

    rules: Rules
    ledger: Ledger
    admission: Admission
    counts: Counter[str]
    discarded: Discarded = field(default_factory=Discarded)
    refusals_in_row: int = 0
    hopeless: str = ""
    """why the run has to end: too many groups in a row were refused; else empty"""
    held_up: HeldUp | None = None
    """the batch that is to be formed next, if it is held up"""
    held_up_seconds: float = 0.0
    """of all batches since this buffer started"""
    held_up_by: Counter[str] = field(default_factory=Counter)
    """generator -> batches that waited for a group of it"""
    on_formed: Callable[[Iterable[Group], int], None] = lambda groups, step: None
    """called with the groups of each batch, and its step"""
    depth: DepthController | None = field(init=False, default=None)
    """what moves the depth of the pipeline, if anything does"""
    pool: Pool = field(init=False)
    """what of earlier batches may come back"""

    def __post_init__(self) -> None:
        self.pool = Pool(settings=self.rules.pool, seed=self.rules.seed)
        if (control := self.rules.control) is not None:
            start = control.start(self.ledger.policy.pipeline_depth)
            self.depth = DepthController(control=control, ledger=self.ledger, state=start)
            self.ledger.policy = self.ledger.policy.at_depth(start.depth)

    def close(self, group: Group) -> list[do.Effect]:
        """A training group is complete: it waits for a batch, or is refused now."""
        out: list[do.Effect] = []
        reason = untrainable(group, drop_zero_signal=self.rules.drop_zero_signal)
        if (feedback := self.admission.feedback) is not None:
            out.append(do.AddOutcome(outcome=feedback.close(group)))
            reason = reason or feedback.refusal(group) or None
        if reason is not None:
            return out + self.refuse(group.group, reason)
        self.refusals_in_row = 0
        self.ledger.finish(group.group)
        self.admission.windows.add(group)
        return out

    def form(self, step: int, now: float) -> tuple[list[do.Effect], tuple[int, ...]]:
        """Form the batch of `step`, if it can be filled: (effects, its groups; none: not yet)."""
        out = self._refuse_overdue()
        chosen = self.ledger.choose()
        while chosen is not None and (stale := self.ledger.too_stale(chosen)):
            for group, reason in stale:
                out += self.refuse(group, reason)
            chosen = self.ledger.choose()
        if chosen is None:
            self._note_held_up(now)
            return out, ()
        members = [self.ledger.groups[group] for group in chosen]
        for member in members:
            self.discarded.train(member)
        self.on_formed(members, step)
        drawn = self._draw(step, members)
        if self.admission.feedback is not None:
            self.admission.feedback.form(members)
        self.ledger.form_batch(chosen)
        self.counts["groups_trained"] += len(chosen)
        out.append(do.FormBatch(step=step, groups=tuple(chosen), formed_at=now, drawn=drawn))
        return [*out, *self._note_formed(step, now), *self._refuse_overdue()], tuple(chosen)

    def _draw(self, step: int, members: Iterable[Group]) -> Drawn:
        """What of earlier batches comes back in that of `step`; its own groups may from the next one on."""
        if not self.pool.on:
            return Drawn()
        fresh = [FreshGroup.of(member) for member in members]
        self.pool.expire(step)
        drawn = self.pool.draw(step, fresh)
        self.pool.use(drawn.rows)
        self.pool.add(fresh)
        return drawn

    def refuse(self, number: int, reason: str) -> list[do.Effect]:
        """It will not be trained; it stays in the store with the reason, and its slot is free."""
        group = self.ledger.groups[number]
        out: list[do.Effect] = [do.RefuseGroup(group=number, reason=reason)]
        stale = reason.startswith("stale")
        if not group.complete:
            owed = group.holder in self.admission.generators
            if owed and group.holder is not None:
                out.append(do.Send(peer=group.holder, message=msg.Abandon(groups=(number,))))
            if group.begun:
                out.append(do.DropTurns(pairs=[(number, sample) for sample in sorted(group.begun)]))
            self.admission.complete(group)
        else:
            owed = False
        self.discarded.refuse(group, stale=stale, owed=owed)
        if stale and self.ledger.policy.refills:
            self.admission.ask_again(group)
        self.ledger.refuse(number)
        self.counts["groups_refused"] += 1
        self.counts[f"refused_{reason.split(':')[0]}"] += 1
        self.refusals_in_row += 1
        if self.refusals_in_row >= self.rules.max_refusals:
            self.hopeless = f"{self.refusals_in_row} groups in a row were refused, the last because: {reason}"
        return out

    def late(self, trajectory: Trajectory) -> bool:
        """Count a trajectory of a group that was dropped while it ran; False when it is none, or not new."""
        if trajectory.group not in self.discarded.running or not self.discarded.late(trajectory):
            return False
        self.counts["trajectories_train"] += 1
        if trajectory.failed and trajectory.reason != msg.ABANDONED:
            self.counts["trajectories_failed"] += 1
        return True

    def trained(self, step: int, ess: float) -> list[do.Effect]:
        """The trainer has done `step` with this ESS / B in its batch (-1: not reported)."""
        return [] if self.depth is None or ess == -1 else self.depth.observe(step=step, ess=ess)

    def _refuse_overdue(self) -> list[do.Effect]:
        """Refuse what can no longer be trained in time."""
        out: list[do.Effect] = []
        for group, reason in self.ledger.overdue():
            out += self.refuse(group, reason)
        return out

    def _note_held_up(self, now: float) -> None:
        """Remember for whom a batch waits that could be filled without them."""
        if self.held_up is not None:
            return
        due = self.ledger.policy.held_up_by(self.ledger.queue, step=self.ledger.step)
        if due:
            holders = [self.admission.generators.get(self.ledger.groups[group].holder or b"") for group in due]
            names = sorted({holder.name if holder is not None else "" for holder in holders})
            self.held_up = HeldUp(since=now, groups=due, generators=names)

    def _note_formed(self, step: int, now: float) -> list[do.Effect]:
        """The batch is formed: record for whom it had to wait."""
        held, self.held_up = self.held_up, None
        if held is None:
            return []
        self.counts["batches_held_up"] += 1
        self.held_up_seconds += now - held.since
        for name in held.generators:
            self.held_up_by[name or "nobody"] += 1
        waited = BatchHeldUp(
            step=step, seconds=now - held.since, groups=tuple(held.groups), generators=tuple(held.generators)
        )
        return [do.Note(event=waited)]
