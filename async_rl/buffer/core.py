"""The buffer as a pure state machine (`Core`): `handle(peer, message, now) -> effects`.

It has no I/O, no clock and no randomness of its own: the same messages at the same times give the same effects, so the
whole asynchronous behaviour is tested on a virtual clock (tests/buffer).

Who waits for whom: a generator waits for permits (slots are freed by batches trained and weights held); the trainer
waits for finished groups; the buffer waits for nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from async_rl.buffer import effects as do
from async_rl.buffer.acceptance import LAUNCHER, Acceptance, Objection, Refusals
from async_rl.buffer.admission import Admission
from async_rl.buffer.batching import Batching
from async_rl.buffer.depth import Rules
from async_rl.buffer.evaluation import Evaluations, RunningEvaluation, evaluation_groups, evaluation_result
from async_rl.buffer.failures import Failures
from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.poison import KEY as POISON_KEY
from async_rl.buffer.poison import Poison, failed_trajectories
from async_rl.buffer.presence import Attendance, Presence
from async_rl.buffer.sampler_feedback import Feedback
from async_rl.buffer.trust import Trust
from async_rl.buffer.verification import Sampling
from async_rl.buffer.waits import PendingBatch, Waits
from async_rl.events import ProblemRefused
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import Blob, WireError
from async_rl.wire import messages as msg


@dataclass(slots=True)
class Core:
    """Messages in, effects out. `ledger` knows what is admitted, `admission` who may start what, `acceptance` what is
    taken from whom, `batching` what becomes of complete groups, `waits` who waits for whom."""

    rules: Rules
    problem_at: Callable[[int], int]
    """prompt order: position -> problem index"""
    ledger: Ledger = field(init=False)
    admission: Admission = field(init=False)
    acceptance: Acceptance = field(init=False)
    presence: Presence = field(init=False)
    attendance: Attendance = field(init=False)
    evaluations: Evaluations = field(default_factory=Evaluations)
    refusals: Refusals = field(default_factory=Refusals)
    batching: Batching = field(init=False)
    poison: Poison = field(init=False)
    trust: Trust = field(init=False)
    trainer: bytes = b""
    """the peer that is the trainer, by its Hello; empty: none yet"""
    waits: Waits = field(init=False)
    consumed: int = 0
    """newest version that is in a checkpoint, as far as this buffer knows"""
    counts: Counter[str] = field(default_factory=Counter)
    """events by name, since the start of the run"""
    failures_in_row: int = 0
    failures: Failures = field(default_factory=Failures)
    ended: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(policy=self.rules.policy)
        self.presence = Presence(self.rules.frozen_after_s)
        self.admission = Admission(
            rules=self.rules,
            problem_at=self.problem_at,
            ledger=self.ledger,
            evaluations=self.evaluations,
            counts=self.counts,
        )
        if self.rules.sampler is not None:
            self.admission.feedback = Feedback(rules=self.rules.sampler, ledger=self.ledger)
        self.waits = Waits(
            report_after_s=self.rules.stall_report_s,
            ledger=self.ledger,
            admission=self.admission,
            presence=self.presence,
            evaluations=self.evaluations,
            counts=self.counts,
        )
        self.batching = Batching(rules=self.rules, ledger=self.ledger, admission=self.admission, counts=self.counts)
        self.poison = Poison(limit=self.rules.max_deaths)
        self.admission.refuse = self._refuse_if_poisoned
        self.attendance = Attendance(admission=self.admission, presence=self.presence)
        self.trust = Trust(
            sampling=Sampling(
                share=self.rules.verify_share, group_size=self.rules.group_size, secret=self.rules.secret
            ),
            ledger=self.ledger,
            admission=self.admission,
            attendance=self.attendance,
            batching=self.batching,
        )
        self.batching.on_formed = self.trust.trained
        self.admission.forgotten = self.trust.forget
        self.waits.quarantined = self.trust.told
        self.acceptance = Acceptance(
            rules=self.rules,
            ledger=self.ledger,
            admission=self.admission,
            evaluations=self.evaluations,
            trust=self.trust,
        )

    @property
    def pending(self) -> PendingBatch | None:
        """The batch the trainer waits for."""
        return self.waits.batch

    @property
    def step(self) -> int:
        """The step of the next batch."""
        return self.ledger.step

    @property
    def published(self) -> int:
        """Newest version the trainer has published."""
        return self.ledger.published

    @property
    def groups(self) -> Mapping[int, Group]:
        """Training groups that are in no batch yet."""
        return self.ledger.groups

    # ------------------------------------------------------------------ entry

    def handle(self, peer: bytes, message: msg.Message, now: float) -> list[do.Effect]:
        """The effects of one message at time `now` (seconds, any monotonic clock)."""
        self.presence.receive(peer, message, now)
        if (objection := self.acceptance.message(peer, message, self.trainer)) is not None:
            return self._refused(peer, message, objection, now)
        match message:
            case msg.Finished():
                return self._finished(peer, message, now)
            case msg.Turns():
                return self._turns(peer, message, now)
            case msg.Want():
                self.attendance.want(peer, message)
                return self._grant(now, peer)
            case msg.Holds():
                return self._holds(peer, message.version, now)
            case msg.Status():
                return self.attendance.status(peer, message, published=self.published, now=now) + self._grant(now, peer)
            case msg.Pulse():
                return [do.Send(peer=peer, message=msg.PulseAnswer())] if self._may_answer(peer, now) else []
            case msg.Canary():
                return self.attendance.canary(peer, message, self.trainer)
            case msg.NextBatch():
                return self._next_batch(peer, message, now)
            case msg.Published():
                return self._published(message, now)
            case msg.Checkpointed():
                return self._checkpointed(message)
            case msg.Verdict():
                return [*self.trust.verdict(message, now), *self._hopeless(), *self._grant(now)]
            case msg.Evaluate():
                return self._evaluate(message, now)
            case msg.FetchEvaluation():
                return self._fetch_evaluation(peer, message, now)
            case msg.Hello():
                return self._hello(peer, message, now)
            case msg.Leave():
                return self.attendance.leave(peer, message) + self._grant(now)
            case msg.Gone():
                return self._gone(message, now)
            case msg.Query():
                return self._query(peer, now)
            case msg.Join() if self.refusals.may_answer(now):
                return self.attendance.join(peer)
            case msg.Preempt() if self.trainer:
                return [do.Send(peer=self.trainer, message=message)]
            case msg.Done() | msg.Shutdown():
                return self._end(message.reason, failed=False)
            case _:
                return []

    def malformed(self, peer: bytes, error: WireError, now: float) -> list[do.Effect]:
        """The effects of bytes that are no message."""
        return self._object(peer, None, Objection(kind=error.kind, reason=str(error)), now)

    def _refused(self, peer: bytes, message: msg.Message, objection: Objection, now: float) -> list[do.Effect]:
        """Refuse a message. A generator that this buffer does not know (any more) is told so and joins anew."""
        out = self._object(peer, message, objection, now)
        answered = any(isinstance(effect, do.Send) for effect in out)
        if answered and objection.kind == "stranger" and isinstance(message, msg.Want | msg.Status):
            out.append(do.Send(peer=peer, message=msg.Unknown(session=message.session)))
        return out

    def _object(
        self,
        peer: bytes,
        message: msg.Message | None,
        objection: Objection,
        now: float,
        pairs: tuple[tuple[int, int], ...] = (),
    ) -> list[do.Effect]:
        """`message`: None: what came is none."""
        answer = peer == self.trainer or self.refusals.may_answer(now)
        what = "message" if message is None else type(message).__name__
        session = self.trust.session(peer, message)
        return self.refusals.refuse(peer, what, objection, answer=answer, pairs=pairs, session=session)

    def _query(self, peer: bytes, now: float) -> list[do.Effect]:
        answer = self._may_answer(peer, now)
        return [do.Send(peer=peer, message=self.snapshot(now))] if answer else []

    def _may_answer(self, peer: bytes, now: float) -> bool:
        """Whether a peer is answered: known ones always, strangers as long as that is cheap."""
        return peer == LAUNCHER or self.presence.knows(peer) or self.refusals.may_answer(now)

    def tick(self, now: float) -> list[do.Effect]:
        """Time passes: give up frozen generators, tell a waiting trainer whom it waits for."""
        out, silent = self.attendance.remove_frozen(now)
        for gone in silent:
            out += self._blame(gone, now, silent=True)
        out += self._grant(now) if out else []
        return out if self.ended else out + self.waits.tick(now)

    def lost(self, peer: bytes, now: float) -> list[do.Effect]:
        """A generator is gone: its permits go to others at no new charge."""
        return self._grant(now) if self.attendance.remove(peer) else []

    # ------------------------------------------------------------- generators

    def _hello(self, peer: bytes, hello: msg.Hello, now: float) -> list[do.Effect]:
        if hello.role == "generator":
            self.poison.came_back(hello.name, hello.pid)
            return [*self.attendance.hello(peer, hello, published=self.published, now=now), *self._grant(now)]
        if hello.role == "trainer":
            self.trainer = self.waits.trainer = peer
            self.presence.add(peer, hello, now)
        return []

    def _holds(self, peer: bytes, version: int, now: float) -> list[do.Effect]:
        generator = self.admission.generators[peer]
        if version <= generator.version:
            return []
        generator.version = version
        return self._grant(now, peer)

    def _grant(self, now: float, only: bytes = b"") -> list[do.Effect]:
        return [] if self.ended else self.admission.grant(now, only)

    def _gone(self, gone: msg.Gone, now: float) -> list[do.Effect]:
        """A generator's process has ended; its problem is refused when that was the problem's fault too often."""
        self.poison.came_back(gone.name, gone.pid)  # what its silence was taken for: now more is known
        return [*self.attendance.gone(gone), *self._blame(gone, now), *self._grant(now)]

    def _blame(self, gone: msg.Gone, now: float, *, silent: bool = False) -> list[do.Effect]:
        """Count the end of a process against the problems whose code may have been why."""
        groups = [group for number in gone.groups if (group := self._group(number)) is not None]
        if not groups:
            return []
        refused = self.poison.add(gone, groups, silent=silent)
        out: list[do.Effect] = [do.Remember(key=POISON_KEY, value=self.poison.remembered())]
        for split, problem in refused:
            reason = self.poison.refused[split, problem]
            out.append(do.Note(event=ProblemRefused(split=split, problem=problem, reason=reason)))
        return out + (self._refuse_poisoned(now) if refused else [])

    def _refuse_poisoned(self, now: float) -> list[do.Effect]:
        """Refuse the unfinished groups of problems that may not be asked any more; held-out ones fail."""
        out: list[do.Effect] = []
        for group in [g for g in self.groups.values() if not g.complete]:
            if reason := self.poison.reason(group):
                out += self.batching.refuse(group.group, reason)
        for _, group in list(self.evaluations.groups.values()):
            reason = self.poison.reason(group)
            if reason and not group.complete:
                failed = failed_trajectories(group, reason, now)
                for trajectory in failed:
                    group.arrive(trajectory)
                    self.counts["trajectories_eval"] += 1
                    self.counts["trajectories_failed"] += 1
                    self.failures.add(reason)
                out.append(do.AddTrajectories(trajectories=failed, blobs=[]))
                self.admission.complete(group)
        return out + self._hopeless()

    # ----------------------------------------------------------- trajectories

    def _finished(self, peer: bytes, finished: msg.Finished, now: float) -> list[do.Effect]:
        fresh: list[Trajectory] = []
        late: list[Trajectory] = []
        blobs: list[Blob] = []
        closed: list[Group] = []
        begun: list[tuple[int, int]] = []
        verifiable: list[tuple[Trajectory, Group]] = []
        possible, out = self._sift(peer, finished, now)
        sender = self.trust.named(peer)
        for place, trajectory, group in possible:
            if self.batching.late(trajectory):
                late.append(trajectory)
                continue
            name = sender or trajectory.generator
            if group is None or not group.arrive(trajectory, name):
                self.counts["trajectories_ignored"] += 1
                continue
            if name != trajectory.generator:
                trajectory = replace(trajectory, generator=name)  # what it was sent by, not what it says
            group.senders.add(name)
            verifiable.append((trajectory, group))
            fresh.append(trajectory)
            blobs += finished.blobs[place : place + 1]
            if trajectory.sample in group.begun:
                group.begun.remove(trajectory.sample)
                begun.append((trajectory.group, trajectory.sample))
            self._count(trajectory, group)
            if group.complete:
                closed.append(group)
        if fresh:
            out.append(do.AddTrajectories(trajectories=fresh, blobs=blobs))
        if late:
            out.append(do.AddDropped(trajectories=late))
        if begun:
            out.append(do.DropTurns(pairs=begun))
        if possible:
            pairs = tuple([(t.group, t.sample) for _, t, _ in possible])
            out.append(do.Send(peer=peer, message=msg.Accepted(pairs=pairs)))
        out += self.trust.sample(peer, finished, verifiable, self.trainer)
        for group in closed:
            self.admission.complete(group)
            if group.split == "train":
                out += self.batching.close(group) + self._hopeless()
        if self.failures_in_row >= self.rules.max_failures:
            out += self._end(
                f"{self.failures_in_row} trajectories in a row failed; the last one: {self.failures.last}", failed=True
            )
        if closed:
            out += self._try_batch(now)
            if self.ledger.policy.finish_frees or any(isinstance(effect, do.RefuseGroup) for effect in out):
                out += self._grant(now)
        return out

    def _turns(self, peer: bytes, turns: msg.Turns, now: float) -> list[do.Effect]:
        """Keep the finished turns of long episodes, so that long ones are not lost more often than short ones."""
        kept = []
        possible, out = self._sift(peer, turns, now)
        for _, trajectory, group in possible:
            if group is None or group.group not in self.groups or trajectory.sample not in group.missing:
                continue
            group.begun.add(trajectory.sample)
            group.senders.add(self.trust.named(peer) or trajectory.generator)
            kept.append(trajectory)
        self.counts["turns_saved"] += len(kept)
        return [*out, do.SaveTurns(trajectories=kept)] if kept else out

    def _sift(
        self, peer: bytes, message: msg.Finished | msg.Turns, now: float
    ) -> tuple[list[tuple[int, Trajectory, Group | None]], list[do.Effect]]:
        """(place, trajectory, its group if that is live) of those that may be what they say; effects for the others."""
        possible: list[tuple[int, Trajectory, Group | None]] = []
        refused: dict[str, tuple[Objection, list[tuple[int, int]]]] = {}
        for place, trajectory in enumerate(message.trajectories):
            group = self._group(trajectory.group)
            objection = self.acceptance.trajectory(peer, trajectory, group)
            if objection is None:
                possible.append((place, trajectory, group))
                continue
            refused.setdefault(objection.kind, (objection, []))[1].append((trajectory.group, trajectory.sample))
        out: list[do.Effect] = []
        for objection, pairs in refused.values():
            out += self._object(peer, message, objection, now, tuple(pairs))
        if refused.keys() & {"version", "tokens"}:
            out += self.trust.impossible(peer, message, now)
        return possible, out

    def _group(self, number: int) -> Group | None:
        """The group of this number that is live, or was dropped while it ran."""
        entry = self.evaluations.groups.get(number)
        if entry is not None:
            return entry[1]
        return self.ledger.groups.get(number) or self.batching.discarded.running.get(number)

    def _count(self, trajectory: Trajectory, group: Group) -> None:
        """It has arrived in `group`."""
        self.counts["trajectories_train" if trajectory.split == "train" else "trajectories_eval"] += 1
        self.admission.arrived_tokens += group.samples[trajectory.sample].policy_length
        if trajectory.failed:
            self.counts["trajectories_failed"] += 1
            self.failures_in_row += 1
            self.failures.add(trajectory.reason)
        else:
            self.failures_in_row = 0

    # ---------------------------------------------------------------- trainer

    def _next_batch(self, peer: bytes, ask: msg.NextBatch, now: float) -> list[do.Effect]:
        step = ask.step
        if step < self.step:
            # formed before: also for a trainer that goes on from a checkpoint, or fetches the next part
            return [do.SendBatch(peer=peer, step=step, after=ask.after, counters=self.counters())]
        if self.waits.batch is None or self.waits.batch.step != step:
            self.waits.batch = PendingBatch(peer=peer, step=step, since=now, notified=now)
        self.waits.batch.peer = peer
        return self._try_batch(now)

    def _try_batch(self, now: float) -> list[do.Effect]:
        """Form the batch the trainer waits for, if it can be filled."""
        pending = self.pending
        if pending is None or self.ended:
            return []
        out, chosen = self.batching.form(pending.step, now)
        if chosen:
            self.waits.batch = None
            out.append(do.SendBatch(peer=pending.peer, step=pending.step, counters=self.counters()))
        if any(isinstance(effect, do.RefuseGroup) for effect in out):
            out += self._grant(now)  # what was refused gave its slot up
        return out + self._hopeless()

    def _refuse_if_poisoned(self, group: Group) -> list[do.Effect]:
        """Refuse a group that has just been admitted, if its problem may not be asked any more."""
        reason = self.poison.reason(group)
        return [*self.batching.refuse(group.group, reason), *self._hopeless()] if reason else []

    def _hopeless(self) -> list[do.Effect]:
        """End the run when too many groups in a row were refused."""
        return self._end(self.batching.hopeless, failed=True) if self.batching.hopeless else []

    def _published(self, published: msg.Published, now: float) -> list[do.Effect]:
        version = published.version
        if version <= self.published:
            return []
        steps = range(self.published, min(version, self.step))  # the messages about the versions before may be lost
        self.ledger.published = version
        self.waits.note_publication(now)
        out: list[do.Effect] = [do.MarkTrained(step=step) for step in steps]
        for peer, generator in self.admission.generators.items():
            generator.notified = now
            out.append(do.Send(peer=peer, message=msg.NewWeights(version=version)))
        out += self.batching.trained(version - 1, published.ess)
        return out + self._grant(now)

    def _checkpointed(self, done: msg.Checkpointed) -> list[do.Effect]:
        if done.version <= self.consumed:
            return []
        self.consumed = done.version
        return [do.MarkConsumed(step=done.version - 1, oldest=done.oldest)]

    # ------------------------------------------------------------- evaluation

    def _evaluate(self, ask: msg.Evaluate, now: float) -> list[do.Effect]:
        if ask.evaluation in self.evaluations.asked:
            return []
        groups = evaluation_groups(ask, seed=self.rules.seed, new_number=self.ledger.new_number, now=now)
        self.evaluations.add(ask.evaluation, RunningEvaluation(version=ask.version, groups=groups))
        added = [do.add_group(group, generator="") for group in groups]
        return [*added, *self._refuse_poisoned(now), *self._grant(now)]

    def _fetch_evaluation(self, peer: bytes, ask: msg.FetchEvaluation, now: float) -> list[do.Effect]:
        found = self.evaluations.asked[ask.evaluation]
        result = evaluation_result(ask.evaluation, found)
        self.waits.note_fetch(ask.evaluation, waits=ask.waits, finished=result.finished, now=now)
        out: list[do.Effect] = []
        if result.finished and not found.recorded:
            self.evaluations.record(found)
            out.append(do.AddEvaluation(result=result, finished_at=now))
        if not result.finished:
            reason = self.waits.evaluation_reason(found, now)
            result = replace(result, progress=self.waits.progress, reason=reason)
        return [*out, do.Send(peer=peer, message=result)]

    # ----------------------------------------------------------------- report

    def wait_reason(self, now: float) -> str:
        """Who the trainer waits for, since when."""
        return self.waits.batch_reason(now)

    def counters(self) -> msg.BufferCounters:
        """The buffer's state in numbers, but for those of the store."""
        generators = self.admission.generators.values()
        oldest = min((g.version for g in generators), default=self.published)
        policy, batching = self.ledger.policy, self.batching
        return msg.BufferCounters(
            slots_used=policy.used(self.ledger.queue, step=self.step, version=oldest, published=self.published),
            slots=policy.slots,
            pipeline_depth=policy.pipeline_depth,
            generators=len(generators),
            held_versions={g.name: g.version for g in generators},
            generator_busy_seconds=self.admission.busy_seconds,
            task_busy_seconds=self.admission.task_seconds,
            tokens_generated=self.admission.tokens_generated,
            groups_admitted=self.counts["groups_admitted"],
            groups_trained=self.counts["groups_trained"],
            groups_refused=self.counts["groups_refused"],
            trajectories_failed=self.counts["trajectories_failed"],
            trajectories_arrived=self.counts["trajectories_train"] + self.counts["trajectories_eval"],
            failures=self.failures.told(),
            last_failure=self.failures.last,
            refused_length=batching.discarded.mean_refused,
            messages_refused=self.refusals.counts.total(),
            batches_held_up=self.counts["batches_held_up"],
            held_up_seconds=batching.held_up_seconds,
            held_up_by=dict(batching.held_up_by),
            dropped=batching.discarded.counters(groups=self.counts["refused_stale"]) if policy.refills else None,
            sampler=None if self.admission.feedback is None else self.admission.feedback.counters,
        )

    def oldest_live(self) -> int:
        """Lowest number of a group that is in no batch yet or has not gone on, or of an evaluation under way."""
        live = [*self.groups, *self.evaluations.groups]
        if (cut := self.admission.windows.oldest) is not None:
            live.append(cut)  # its tokens are still to be given to the group in which it goes on
        return min(live, default=self.ledger.next_group)

    def snapshot(self, now: float) -> msg.Snapshot:
        """The buffer's state, for a person or a monitor."""
        return msg.Snapshot(
            step=self.step,
            published=self.published,
            consumed=self.consumed,
            live=len(self.groups),
            waits=tuple(self.waits.rows(now)),
            generators=tuple(
                msg.GeneratorState(name=g.name, version=g.version, held=g.held, running=g.running)
                for g in self.admission.generators.values()
            ),
            processes=tuple(self.presence.rows(now)),
            counts=dict(self.counts),
            refused=dict(self.refusals.counts),
            counters=self.counters(),
        )

    def _end(self, reason: str, *, failed: bool) -> list[do.Effect]:
        if self.ended:
            return []
        self.ended = True
        out: list[do.Effect] = [
            do.Send(peer=peer, message=msg.Stop(reason=reason)) for peer in self.admission.generators
        ]
        return [*out, do.EndRun(reason=reason, failed=failed)]
