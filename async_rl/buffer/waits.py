"""Who waits for whom, since when, on what, and the last thing heard of it.

Two sides can wait: the trainer for a batch or an evaluation (then generators are behind), generators for
permits (then the trainer is). A wait that lasts longer than `stall_report_s` is reported, again after twice
the time, and once more when it is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from async_rl.buffer import effects as do
from async_rl.buffer.admission import Admission
from async_rl.buffer.evaluation import Evaluation, Evaluations
from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.presence import Presence
from async_rl.events import StallOver, StallReported
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    pass


# -------------------- report
# What the buffer tells of itself: whom the trainer waits for, and the counters of every batch.


def wait_reason(ledger: Ledger, admission: Admission, presence: Presence, *, now: float) -> str:
    """Who the trainer is waiting for, since when."""
    text = f"{ledger.line.num_ready} of {ledger.policy.groups_per_step} groups finished"
    open_groups = [g for g in ledger.groups.values() if not g.complete]
    if open_groups:
        return f"{text}; {_oldest(open_groups, admission, presence, now)}"
    if not admission.generators:
        return f"{text}; no generator is connected{admission.rules.how_to_join}"
    behind = [f"{g.name} holds version {g.version}" for g in admission.generators.values()]
    words = [presence.last_word(peer, now) for peer in admission.generators]
    text = f"{text}; no group is running, newest weights are version {ledger.published}, {', '.join(behind)}"
    return "; ".join([text, *words])


def evaluation_reason(evaluation: Evaluation, admission: Admission, presence: Presence, now: float) -> str:
    """Who an evaluation waits for, since when."""
    open_groups = [g for g in evaluation.groups if not g.complete]
    if not open_groups:
        return "all of its episodes are there"  # the trainer has not looked since
    text = f"{sum(len(g.missing) for g in open_groups)} of its episodes are missing"
    if not admission.generators:
        return f"{text}; no generator is connected{admission.rules.how_to_join}"
    return f"{text}; {_oldest(open_groups, admission, presence, now)}"


def permit_reason(
    peer: bytes, ledger: Ledger, admission: Admission, presence: Presence, trainer: bytes, now: float
) -> str:
    """Why a generator that wants permits gets none."""
    generator = admission.generators[peer]
    if not trainer:
        return "no trainer has come yet"
    word = presence.last_word(trainer, now)
    if generator.version < ledger.published:
        held = f"it holds version {generator.version}, the newest is {ledger.published}"
        return f"{held}; {presence.last_word(peer, now)}; {word}"
    used = ledger.policy.used(ledger.line, step=ledger.step, version=generator.version, published=ledger.published)
    text = (
        f"{used} of {ledger.policy.slots} slots are in use; the trainer has published version {ledger.published} and "
        f"{ledger.line.num_ready} finished groups wait for it; {word}"
    )
    running = [g for g in ledger.groups.values() if not g.complete]
    return f"{text}; {_oldest(running, admission, presence, now)}" if running else text


def _oldest(groups: Sequence[Group], admission: Admission, presence: Presence, now: float) -> str:
    """The open group that waits longest, on whom, and the last thing heard of it."""
    oldest = min(groups, key=lambda g: g.group)
    holder = oldest.holder or b""
    generator = admission.generators.get(holder)
    text = (
        f"oldest is group {oldest.group} on {generator.name if generator is not None else 'no generator'}, "
        f"{now - oldest.admitted_at:.1f} s, {len(oldest.samples)}/{oldest.size} samples"
    )
    return f"{text}; {presence.last_word(holder, now)}" if generator is not None else text


WAITING_NOTICE_S = 2.0
"""how often a waiting trainer is told whom it waits for, seconds"""
STILL_ASKED_S = 5.0
"""a trainer that waits for an evaluation asks all the time; when it has not for so long, it does not wait"""


@dataclass(slots=True, kw_only=True)
class PendingBatch:
    """The batch the trainer waits for."""

    peer: bytes
    step: int
    since: float
    told: float


@dataclass(slots=True, kw_only=True)
class PendingEvaluation:
    """The evaluation the trainer waits for."""

    number: int
    since: float
    asked: float
    """when it asked last"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    key: str
    """the same for as long as it goes on"""
    who: str
    what: str
    """it waits for"""
    since: float
    why: Callable[[], str]
    """who keeps it waiting, as far as is known"""


@dataclass(slots=True, kw_only=True)
class Stall:
    """A wait that was reported."""

    wait: Wait
    next_at: float
    """waited seconds at which it is reported again"""


@dataclass(slots=True, kw_only=True)
class Waits:
    """All that go on; reads the state machine's parts and changes nothing in them."""

    after_s: float
    """of waiting, before it is reported"""
    ledger: Ledger
    admission: Admission
    presence: Presence
    evaluations: Evaluations
    counts: Counter[str]
    batch: PendingBatch | None = None
    evaluation: PendingEvaluation | None = None
    trainer: bytes = b""
    """the peer, as far as it is known"""
    stalls: dict[str, Stall] = field(default_factory=dict)
    """by the key of the wait"""

    @property
    def progress(self) -> int:
        """Grows with everything that generators do."""
        trajectories = self.counts["trajectories_train"] + self.counts["trajectories_eval"]
        return trajectories + self.counts["turns_saved"] + self.admission.tokens_generated

    def batch_reason(self, now: float) -> str:
        """Who a batch waits for, since when."""
        return wait_reason(self.ledger, self.admission, self.presence, now=now)

    def fetched(self, number: int, *, waits: bool, finished: bool, now: float) -> None:
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
        if self.batch is not None and now - self.batch.told >= WAITING_NOTICE_S:
            self.batch.told = now
            waiting = msg.Waiting(
                what=f"batch of step {self.batch.step}",
                reason=self.batch_reason(now),
                seconds=now - self.batch.since,
                progress=self.progress,
            )
            out.append(do.Send(peer=self.batch.peer, message=waiting))
        self._idle(now)
        return out + self._report(now)

    def rows(self, now: float) -> list[msg.StandingWait]:
        """All waits of more than a second."""
        return [
            msg.StandingWait(who=w.who, what=w.what, seconds=round(now - w.since, 3), why=w.why())
            for w in self._all(now)
            if now - w.since > 1
        ]

    def _all(self, now: float) -> Iterator[Wait]:
        if self.batch is not None:
            what = f"the batch of step {self.batch.step}"
            why = lambda: self.batch_reason(now)  # noqa: E731
            yield Wait(key="batch", who="trainer", what=what, since=self.batch.since, why=why)
        pending = self.evaluation
        if pending is not None and now - pending.asked < STILL_ASKED_S:
            asked = self.evaluations.asked[pending.number]
            yield Wait(
                key="evaluation",
                who="trainer",
                what=f"evaluation {pending.number}",
                since=pending.since,
                why=lambda: evaluation_reason(asked, self.admission, self.presence, now),
            )
        idle = {peer: g.idle_since for peer, g in self.admission.generators.items() if g.idle_since is not None}
        if idle:
            first = min(idle, key=lambda peer: idle[peer])
            who = self.admission.generators[first].name + (f" and {len(idle) - 1} more" if len(idle) > 1 else "")
            why = lambda: permit_reason(first, self.ledger, self.admission, self.presence, self.trainer, now)  # noqa: E731
            yield Wait(key="permits", who=who, what="permits", since=idle[first], why=why)

    def _idle(self, now: float) -> None:
        """Since when each generator has had room and nothing to do."""
        for generator in self.admission.generators.values():
            if generator.groups or generator.granted >= generator.limit:
                generator.idle_since = None
            elif generator.idle_since is None:
                generator.idle_since = now

    def _report(self, now: float) -> list[do.Effect]:
        out: list[do.Effect] = []
        waits = {wait.key: wait for wait in self._all(now)}
        for key, stall in list(self.stalls.items()):
            wait = waits.get(key)
            if wait is None or (wait.what, wait.since) != (stall.wait.what, stall.wait.since):
                del self.stalls[key]
                waited = round(now - stall.wait.since, 3)
                out.append(do.Note(event=StallOver(waits=stall.wait.who, what=stall.wait.what, seconds=waited)))
        for key, wait in waits.items():
            waited = now - wait.since
            if waited < (self.stalls[key].next_at if key in self.stalls else self.after_s):
                continue
            self.stalls[key] = Stall(wait=wait, next_at=2 * waited)
            text = f"{wait.who} waits {waited:.0f} s for {wait.what}: {wait.why()}"
            report = StallReported(waits=wait.who, what=wait.what, seconds=round(waited, 3), text=text)
            out.append(do.Note(event=report))
        return out
