"""Who waits for whom, since when, for what, and what was last received from whoever keeps it waiting.

Two sides can wait: the trainer for a batch or an evaluation (then generators are behind), generators for permits
(then the trainer is). A wait that lasts longer than `wire.stall_report_s`, and longer than PATIENCE steps of this run
take, is reported, again after twice the time, and once more when it is over.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from async_rl.buffer import effects as do
from async_rl.buffer.admission import Admission
from async_rl.buffer.evaluation import Evaluations, RunningEvaluation
from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.presence import Presence
from async_rl.events import StallOver, StallReported
from async_rl.stall_timer import StallTimer
from async_rl.wire import messages as msg

NOTICE_S = 2.0
"""seconds between two messages that tell a waiting trainer whom it waits for"""
STOPPED_ASKING_S = 5.0
"""a trainer that waits for an evaluation asks all the time; one that has not asked for so long does not wait"""
PATIENCE = 2
"""a wait is reported once it is longer than so many training steps: where one takes a minute, 10 s are usual"""
STEPS_SEEN = 5
"""training steps of which the longest counts"""
SHOWN_S = 1.0
"""shorter waits are in no snapshot"""
MOST_NAMED = 8
"""generators that a reason names"""


@dataclass(slots=True, kw_only=True)
class PendingBatch:
    """The batch the trainer waits for."""

    peer: bytes
    step: int
    since: float
    notified: float
    """when the trainer was last told whom it waits for"""


@dataclass(slots=True, kw_only=True)
class PendingEvaluation:
    """The evaluation the trainer waits for."""

    number: int
    since: float
    asked: float
    """when it asked last"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWait:
    """A wait that goes on."""

    key: str
    """the same for as long as it goes on"""
    who: str
    """waits"""
    what: str
    """it waits for"""
    since: float
    describe: Callable[[], str]
    """who keeps it waiting, as far as is known"""


@dataclass(slots=True, kw_only=True)
class ReportedStall:
    """A wait that was reported."""

    wait: OpenWait
    timer: StallTimer


@dataclass(slots=True, kw_only=True)
class Waits:
    """All waits that go on. Reads the state machine's parts and changes nothing in them. Times are the buffer's
    clock, seconds."""

    report_after_s: float
    """wire.stall_report_s"""
    ledger: Ledger
    admission: Admission
    presence: Presence
    evaluations: Evaluations
    counts: Counter[str]
    quarantined: Callable[[], str] = lambda: ""
    """names the generators that lied, behind "no generator is connected" """
    batch: PendingBatch | None = None
    evaluation: PendingEvaluation | None = None
    trainer: bytes = b""
    """the peer that is the trainer; empty: none yet"""
    stalls: dict[str, ReportedStall] = field(default_factory=dict)
    """by the key of the wait"""
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_SEEN))
    """seconds between the last publications"""
    published_at: float = field(default=math.nan)
    """when weights were last published; nan: not yet"""
    absent_since: float = field(default=math.nan)
    """when the last generator left, or the run began; nan: one is connected"""
    absences: int = 0
    """grows while generators that join by themselves are away and may be"""

    @property
    def progress(self) -> int:
        """A number that grows with everything that generators do, and while none is there and none need be."""
        trajectories = self.counts["trajectories_train"] + self.counts["trajectories_eval"]
        return trajectories + self.counts["turns_saved"] + self.admission.tokens_generated + self.absences

    @property
    def usual_s(self) -> float:
        """Seconds that a wait may last without a report."""
        return max([self.report_after_s, *(PATIENCE * seconds for seconds in self.steps_s)])

    def note_publication(self, now: float) -> None:
        """The trainer published weights: a step is over."""
        if math.isfinite(self.published_at):
            self.steps_s.append(now - self.published_at)
        self.published_at = now

    def note_fetch(self, number: int, *, waits: bool, finished: bool, now: float) -> None:
        """The trainer asked how far an evaluation is."""
        if not waits or finished:
            self.evaluation = None
        elif self.evaluation is None or self.evaluation.number != number:
            self.evaluation = PendingEvaluation(number=number, since=now, asked=now)
        else:
            self.evaluation.asked = now

    def tick(self, now: float) -> list[do.Effect]:
        """Tell a waiting trainer whom it waits for; report what waits too long."""
        out: list[do.Effect] = []
        self._note_absence(now)
        if self.batch is not None and now - self.batch.notified >= NOTICE_S:
            self.batch.notified = now
            waiting = msg.Waiting(
                what=f"batch of step {self.batch.step}",
                reason=self.batch_reason(now),
                seconds=now - self.batch.since,
                progress=self.progress,
            )
            out.append(do.Send(peer=self.batch.peer, message=waiting))
        self._mark_idle(now)
        return out + self._report(now)

    def _note_absence(self, now: float) -> None:
        """A run whose generators join by themselves waits for the first, and for others when all have left."""
        if self.admission.generators:
            self.absent_since = math.nan
            return
        if math.isnan(self.absent_since):
            self.absent_since = now
        if now - self.absent_since < self.admission.rules.absence_s and not self.quarantined():
            self.absences += 1

    def rows(self, now: float) -> list[msg.StandingWait]:
        """All waits of more than SHOWN_S."""
        return [
            msg.StandingWait(who=w.who, what=w.what, seconds=round(now - w.since, 3), why=w.describe())
            for w in self._open(now)
            if now - w.since > SHOWN_S
        ]

    # ------------------------------------------------------------ who keeps whom waiting, in words

    def batch_reason(self, now: float) -> str:
        """Who the trainer waits for when it waits for a batch, since when."""
        ready, generators = self.ledger.queue.num_ready, self.admission.generators
        text = f"{ready} of {self.ledger.policy.groups_per_step} groups finished"
        open_groups = [g for g in self.ledger.groups.values() if not g.complete]
        if open_groups:
            return f"{text}; {self._oldest(open_groups, now)}"
        if not generators:
            return f"{text}; {self._nobody()}"
        named = list(generators.items())[:MOST_NAMED]
        behind = ", ".join(f"{g.name} holds version {g.version}" for _, g in named)
        text = f"{text}; no group is running, newest weights are version {self.ledger.published}, {behind}"
        more = [f"and {len(generators) - len(named)} more generators"] if len(generators) > len(named) else []
        return "; ".join([text, *(self.presence.describe(peer, now) for peer, _ in named), *more])

    def evaluation_reason(self, evaluation: RunningEvaluation, now: float) -> str:
        """Who an evaluation waits for, since when."""
        open_groups = [g for g in evaluation.groups if not g.complete]
        if not open_groups:
            return "all of its episodes are there"  # the trainer has not asked since
        text = f"{sum(len(g.missing) for g in open_groups)} of its episodes are missing"
        if not self.admission.generators:
            return f"{text}; {self._nobody()}"
        return f"{text}; {self._oldest(open_groups, now)}"

    def _nobody(self) -> str:
        return f"no generator is connected{self.quarantined()}{self.admission.rules.how_to_join}"

    def permit_reason(self, peer: bytes, now: float) -> str:
        """Why a generator that wants permits gets none."""
        ledger, generator = self.ledger, self.admission.generators[peer]
        if not self.trainer:
            return "no trainer has come yet"
        trainer = self.presence.describe(self.trainer, now)
        if generator.version < ledger.published:
            held = f"it holds version {generator.version}, the newest is {ledger.published}"
            return f"{held}; {self.presence.describe(peer, now)}; {trainer}"
        used = ledger.policy.used(ledger.queue, step=ledger.step, version=generator.version, published=ledger.published)
        text = (
            f"{used} of {ledger.policy.slots} slots are in use; the trainer has published version {ledger.published} "
            f"and {ledger.queue.num_ready} finished groups wait for it; {trainer}"
        )
        running = [g for g in ledger.groups.values() if not g.complete]
        return f"{text}; {self._oldest(running, now)}" if running else text

    def _oldest(self, groups: Sequence[Group], now: float) -> str:
        """The open group that waits longest, for whom, and what was last received from that generator."""
        oldest = min(groups, key=lambda g: g.group)
        holder = oldest.holder or b""
        generator = self.admission.generators.get(holder)
        nobody = f"no generator{self.quarantined() if not self.admission.generators else ''}"
        text = (
            f"oldest is group {oldest.group} on {generator.name if generator is not None else nobody}, "
            f"{now - oldest.admitted_at:.1f} s, {len(oldest.samples)}/{oldest.size} samples"
        )
        return f"{text}; {self.presence.describe(holder, now)}" if generator is not None else text

    # ------------------------------------------------------------ reports

    def _open(self, now: float) -> Iterator[OpenWait]:
        if self.batch is not None:
            what = f"the batch of step {self.batch.step}"
            describe = lambda: self.batch_reason(now)  # noqa: E731
            yield OpenWait(key="batch", who="trainer", what=what, since=self.batch.since, describe=describe)
        pending = self.evaluation
        if pending is not None and now - pending.asked < STOPPED_ASKING_S:
            asked = self.evaluations.asked[pending.number]
            yield OpenWait(
                key="evaluation",
                who="trainer",
                what=f"evaluation {pending.number}",
                since=pending.since,
                describe=lambda: self.evaluation_reason(asked, now),
            )
        idle = {peer: g.idle_since for peer, g in self.admission.generators.items() if g.idle_since is not None}
        if idle:
            first = min(idle, key=lambda peer: idle[peer])
            who = self.admission.generators[first].name + (f" and {len(idle) - 1} more" if len(idle) > 1 else "")
            describe = lambda: self.permit_reason(first, now)  # noqa: E731
            yield OpenWait(key="permits", who=who, what="permits", since=idle[first], describe=describe)

    def _mark_idle(self, now: float) -> None:
        """Note since when each generator has had room and nothing to do."""
        for generator in self.admission.generators.values():
            if generator.groups or generator.granted >= generator.limit:
                generator.idle_since = None
            elif generator.idle_since is None:
                generator.idle_since = now

    def _longest(self, now: float) -> float:
        """Seconds of the longest wait of those that `_open` tells of, or of one that is over."""
        since = [g.idle_since for g in self.admission.generators.values() if g.idle_since is not None]
        since += [pending.since for pending in (self.batch, self.evaluation) if pending is not None]
        return now - min(since, default=now)

    def _report(self, now: float) -> list[do.Effect]:
        out: list[do.Effect] = []
        if not self.stalls and self._longest(now) < self.report_after_s:
            return out  # as nearly always
        waits = {wait.key: wait for wait in self._open(now)}
        for key, stall in list(self.stalls.items()):
            known, wait = stall.wait, waits.get(key)
            if wait is None or (wait.what, wait.since) != (known.what, known.since):
                del self.stalls[key]
                seconds = round(now - known.since, 3)
                out.append(do.Note(event=StallOver(waits=known.who, what=known.what, seconds=seconds)))
        for key, wait in waits.items():
            waited = now - wait.since
            timer = self.stalls[key].timer if key in self.stalls else StallTimer(self.usual_s)
            if not timer.due(waited):
                continue
            self.stalls[key] = ReportedStall(wait=wait, timer=timer)
            text = f"{wait.who} waits {waited:.0f} s for {wait.what}: {wait.describe()}"
            report = StallReported(waits=wait.who, what=wait.what, seconds=round(waited, 3), text=text)
            out.append(do.Note(event=report))
        return out
