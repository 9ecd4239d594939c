"""The buffer as a pure state machine: `handle(peer, message, now) -> effects`.

No I/O, no clock, no randomness of its own: the same messages at the same times give the same effects,
so the whole asynchronous behaviour is tested on a virtual clock (tests/buffer).

Who waits for whom: a generator waits for permits (slots are freed by batches trained and weights held);
the trainer waits for P finished groups inside the window; the buffer waits for nobody.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from async_rl.buffer import effects as do
from async_rl.buffer.evaluation import Evaluation, evaluation_result
from async_rl.buffer.group import Group
from async_rl.buffer.staleness import Entry, Pace, forget_trained, zero_signal
from async_rl.trajectory import Trajectory
from async_rl.trajectory.seed import group_seed
from async_rl.wire import messages as msg

WAITING_NOTICE_S = 2.0
"""how often a waiting trainer is told whom it waits for, seconds"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings the state machine obeys."""

    pace: Pace
    group_size: int
    """trajectories of one group"""
    temperature: float
    drop_zero_signal: bool
    """refuse groups whose rewards are all equal, at once"""
    max_failures: int
    """trajectories in a row that may fail before the run ends"""
    max_refusals: int
    """groups in a row that may be refused before the run ends"""
    seed: int


@dataclass(slots=True, kw_only=True)
class Generator:
    """What the buffer knows of one generator."""

    name: str
    version: int = 0
    limit: int = 0
    """permits it takes in all since its Hello"""
    granted: int = 0
    """permits given since its Hello"""
    held: int = 0
    """groups it works on"""
    last_heard: float = 0.0
    busy_seconds: float = 0.0
    tokens_generated: int = 0
    running: int = 0


@dataclass(slots=True, kw_only=True)
class PendingBatch:
    peer: bytes
    step: int
    since: float
    told: float


@dataclass(slots=True)
class Core:
    """State: admitted groups in order, generators and what they hold, batches formed."""

    rules: Rules
    problem_at: Callable[[int], int]
    """prompt order: position -> problem index"""
    step: int = 0
    """batches formed so far = the step of the next batch"""
    published: int = 0
    """newest version the trainer has published"""
    next_group: int = 0
    position: int = 0
    """next position in the prompt order"""
    order: list[Entry] = field(default_factory=list)
    groups: dict[int, Group] = field(default_factory=dict)
    """training groups admitted and not yet in a batch or refused"""
    generators: dict[bytes, Generator] = field(default_factory=dict)
    trainer: bytes = b""
    """the peer that said so in its Hello; empty: none yet"""
    orphans: list[int] = field(default_factory=list)
    """admitted groups whose generator was lost"""
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    evaluation_groups: dict[int, tuple[int, Group]] = field(default_factory=dict)
    evaluation_queue: deque[int] = field(default_factory=deque)
    pending: PendingBatch | None = None
    recent: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """groups of the batches last formed, for a trainer that asks again"""
    counts: Counter[str] = field(default_factory=Counter)
    failures_in_row: int = 0
    refusals_in_row: int = 0
    last_failure: str = ""
    ended: bool = False

    # ------------------------------------------------------------------ entry

    def handle(self, peer: bytes, message: msg.Message, now: float) -> list[do.Effect]:
        """Everything that follows from one message at time `now` (seconds, any monotonic clock)."""
        if (known := self.generators.get(peer)) is not None:
            known.last_heard = now
        match message:
            case msg.Finished():
                return self._finished(peer, message, now)
            case msg.Want():
                return self._want(peer, message, now)
            case msg.Holds():
                return self._holds(peer, message.version, now)
            case msg.Status():
                return self._status(peer, message)
            case msg.Canary():
                return self._canary(peer, message)
            case msg.NextBatch():
                return self._next_batch(peer, message.step, now)
            case msg.Published():
                return self._published(message.version, now)
            case msg.Evaluate():
                return self._evaluate(message, now)
            case msg.FetchEvaluation():
                return self._fetch_evaluation(peer, message.evaluation, now)
            case msg.Hello():
                return self._hello(peer, message, now)
            case msg.Query():
                return [do.Send(peer=peer, message=msg.Snapshot(detail=self.snapshot(now)))]
            case msg.Done():
                return self._end(message.reason, failed=False)
            case msg.Shutdown():
                return self._end(message.reason, failed=False)
            case _:
                self.counts["messages_refused"] += 1
                reason = "the buffer does not take this kind"
                return [do.Send(peer=peer, message=msg.Refused(what=type(message).__name__, reason=reason))]

    def tick(self, now: float) -> list[do.Effect]:
        """Time passes: tell a waiting trainer whom it waits for."""
        pending = self.pending
        if pending is None or now - pending.told < WAITING_NOTICE_S:
            return []
        pending.told = now
        return [self._waiting(pending, now)]

    def lost(self, peer: bytes, now: float) -> list[do.Effect]:
        """A generator is gone: its permits go to others at no new charge."""
        gone = self.generators.pop(peer, None)
        if gone is None:
            return []
        self.counts["generators_lost"] += 1
        for group in self.groups.values():
            if group.holder == peer:
                group.holder = None
                if not group.complete:
                    self.orphans.append(group.group)
        for number, (_, group) in self.evaluation_groups.items():
            if group.holder == peer and not group.complete:
                group.holder = None
                self.evaluation_queue.append(number)
        return self._grant(now)

    # ------------------------------------------------------------- generators

    def _hello(self, peer: bytes, hello: msg.Hello, now: float) -> list[do.Effect]:
        if hello.role == "trainer":
            self.trainer = peer
        if hello.role != "generator":
            return []
        out = self.lost(peer, now)
        self.generators[peer] = Generator(name=hello.name, last_heard=now)
        return [*out, do.Send(peer=peer, message=msg.NewWeights(version=self.published))]

    def _want(self, peer: bytes, want: msg.Want, now: float) -> list[do.Effect]:
        generator = self.generators.get(peer)
        if generator is None:
            return [do.Send(peer=peer, message=msg.Refused(what="Want", reason="say Hello first"))]
        generator.limit = max(generator.limit, want.limit)
        generator.version = max(generator.version, want.version)
        return self._grant(now)

    def _holds(self, peer: bytes, version: int, now: float) -> list[do.Effect]:
        generator = self.generators.get(peer)
        if generator is None or version <= generator.version:
            return []
        generator.version = version
        return self._grant(now)

    def _status(self, peer: bytes, status: msg.Status) -> list[do.Effect]:
        if (generator := self.generators.get(peer)) is not None:
            generator.busy_seconds = status.busy_seconds
            generator.tokens_generated = status.tokens_generated
            generator.running = status.running
        return []

    def _canary(self, peer: bytes, canary: msg.Canary) -> list[do.Effect]:
        """The trainer compares; a stranger's evidence is no generator's."""
        generator = self.generators.get(peer)
        if generator is None or not self.trainer:
            self.counts["canaries_ignored"] += 1
            return []
        return [do.Send(peer=self.trainer, message=replace(canary, name=generator.name))]

    def _grant(self, now: float) -> list[do.Effect]:
        """Give every permit that may be given: evaluation first, then orphans, then new groups."""
        out: list[do.Effect] = []
        permits: dict[bytes, list[msg.Permit]] = {}
        while not self.ended:
            granted = self._grant_one(permits, out, now)
            if not granted:
                break
        for peer, list_ in permits.items():
            out.append(do.Send(peer=peer, message=msg.Permits(permits=tuple(list_))))
        return out

    def _grant_one(self, permits: dict[bytes, list[msg.Permit]], out: list[do.Effect], now: float) -> bool:
        willing = [(g.held, peer) for peer, g in self.generators.items() if g.limit > g.granted]
        for _, peer in sorted(willing):
            generator = self.generators[peer]
            group = self._next_for(generator, peer, out, now)
            if group is None:
                continue
            group.holder = peer
            generator.granted += 1
            generator.held += 1
            permits.setdefault(peer, []).append(
                msg.Permit(
                    group=group.group,
                    problem=group.problem,
                    split=group.split,
                    samples=group.missing,
                    seed=group.seed,
                    temperature=group.temperature,
                )
            )
            return True
        return False

    def _next_for(self, generator: Generator, peer: bytes, out: list[do.Effect], now: float) -> Group | None:
        if self.evaluation_queue:
            number = self.evaluation_queue[0]
            evaluation, group = self.evaluation_groups[number]
            if generator.version >= self.evaluations[evaluation].version:
                self.evaluation_queue.popleft()
                return group
        pace = self.rules.pace
        for number in self.orphans:
            ahead = sum(1 for e in self.order if not e.trained and e.group < number)
            if pace.reissue(ahead=ahead, step=self.step, version=generator.version):
                self.orphans.remove(number)
                self.counts["groups_reissued"] += 1
                return self.groups[number]
        if pace.admit(live=len(self.groups), step=self.step, version=generator.version):
            return self._admit(generator, peer, out, now)
        return None

    def _admit(self, generator: Generator, peer: bytes, out: list[do.Effect], now: float) -> Group:
        group = Group(
            group=self.next_group,
            problem=self.problem_at(self.position),
            split="train",
            size=self.rules.group_size,
            # by position in the prompt order, so that evaluations in between change nothing
            seed=group_seed(self.rules.seed, self.position),
            temperature=self.rules.temperature,
            admitted_at=now,
            admitted_version=generator.version,
            holder=peer,
        )
        self.next_group += 1
        self.position += 1
        self.groups[group.group] = group
        self.order.append(Entry(group=group.group))
        self.counts["groups_admitted"] += 1
        out.append(
            do.AddGroup(
                group=group.group,
                problem=group.problem,
                split="train",
                admitted_version=generator.version,
                admitted_at=now,
                generator=generator.name,
            )
        )
        return group

    # ----------------------------------------------------------- trajectories

    def _finished(self, peer: bytes, finished: msg.Finished, now: float) -> list[do.Effect]:
        fresh: list[Trajectory] = []
        closed: list[Group] = []
        for trajectory in finished.trajectories:
            group = self._group_of(trajectory)
            if group is None or trajectory.sample >= group.size or not group.arrive(trajectory):
                self.counts["trajectories_ignored"] += 1
                continue
            fresh.append(trajectory)
            self._count(trajectory)
            if group.complete:
                closed.append(group)
        pairs = tuple((t.group, t.sample) for t in finished.trajectories)
        out: list[do.Effect] = [do.AddTrajectories(trajectories=fresh)] if fresh else []
        out.append(do.Send(peer=peer, message=msg.Accepted(pairs=pairs)))
        for group in closed:
            if (holder := self.generators.get(group.holder or b"")) is not None:
                holder.held -= 1
            group.holder = None
            # the last words of a lost generator may complete a group that was to be given to another
            if group.group in self.orphans:
                self.orphans.remove(group.group)
            if group.group in self.evaluation_queue:
                self.evaluation_queue.remove(group.group)
            if group.split == "train":
                out += self._close(group)
        if self.failures_in_row >= self.rules.max_failures:
            out += self._end(
                f"{self.failures_in_row} trajectories in a row failed; the last one: {self.last_failure}", failed=True
            )
        if closed:
            out += self._try_batch(now)
            out += self._grant(now)
        return out

    def _group_of(self, trajectory: Trajectory) -> Group | None:
        if trajectory.split == "train":
            return self.groups.get(trajectory.group)
        entry = self.evaluation_groups.get(trajectory.group)
        return entry[1] if entry is not None else None

    def _count(self, trajectory: Trajectory) -> None:
        self.counts[f"trajectories_{trajectory.split}"] += 1
        if trajectory.failed:
            self.counts["trajectories_failed"] += 1
            self.failures_in_row += 1
            self.last_failure = trajectory.reason
        else:
            self.failures_in_row = 0

    def _close(self, group: Group) -> list[do.Effect]:
        """A training group is complete: it waits for a batch, or is refused now."""
        usable = group.usable
        if len(usable) < min(2, group.size):
            return self._refuse(group.group, f"{group.size - len(usable)} of {group.size} trajectories failed")
        if self.rules.drop_zero_signal and zero_signal(s.reward for s in usable):
            return self._refuse(group.group, "zero_signal")
        self.refusals_in_row = 0
        for entry in self.order:
            if entry.group == group.group:
                entry.finished = True
        return []

    def _refuse(self, group: int, reason: str) -> list[do.Effect]:
        del self.groups[group]
        self.order = [e for e in self.order if e.group != group]
        forget_trained(self.order)
        self.counts["groups_refused"] += 1
        self.counts[f"refused_{reason.split(':')[0]}"] += 1
        self.refusals_in_row += 1
        out: list[do.Effect] = [do.RefuseGroup(group=group, reason=reason)]
        if self.refusals_in_row >= self.rules.max_refusals:
            out += self._end(
                f"{self.refusals_in_row} groups in a row were refused, the last because: {reason}", failed=True
            )
        return out

    # ---------------------------------------------------------------- trainer

    def _next_batch(self, peer: bytes, step: int, now: float) -> list[do.Effect]:
        if step in self.recent:
            return [do.SendBatch(peer=peer, step=step, groups=self.recent[step], detail=self._detail(now))]
        if step != self.step:
            reason = f"the next batch is that of step {self.step}"
            return [do.Send(peer=peer, message=msg.Refused(what=f"NextBatch({step})", reason=reason))]
        if self.pending is None or self.pending.step != step:
            self.pending = PendingBatch(peer=peer, step=step, since=now, told=now)
        self.pending.peer = peer
        return self._try_batch(now)

    def _try_batch(self, now: float) -> list[do.Effect]:
        """Form the batch the trainer waits for, if it can be filled."""
        pending = self.pending
        out: list[do.Effect] = []
        if pending is None or self.ended:
            return out
        chosen = self.rules.pace.select(self.order)
        while chosen is not None and (stale := self._stale(chosen)):
            for group, reason in stale:
                out += self._refuse(group, reason)
            chosen = self.rules.pace.select(self.order)
        if chosen is None:
            return out
        taken = set(chosen)
        for entry in self.order:
            if entry.group in taken:
                entry.trained = True
        forget_trained(self.order)
        for number in chosen:
            del self.groups[number]
        batch = tuple(chosen)
        self.recent[self.step] = batch
        self.recent.pop(self.step - 2, None)
        self.step += 1
        self.pending = None
        self.counts["groups_trained"] += len(batch)
        out.append(do.FormBatch(step=pending.step, groups=batch, formed_at=now))
        out.append(do.SendBatch(peer=pending.peer, step=pending.step, groups=batch, detail=self._detail(now)))
        return out

    def _stale(self, chosen: list[int]) -> list[tuple[int, str]]:
        found = []
        for number in chosen:
            reason = self.rules.pace.refuse(version_min=self.groups[number].version_min, step=self.step)
            if reason is not None:
                found.append((number, reason))
        return found

    def _published(self, version: int, now: float) -> list[do.Effect]:
        if version <= self.published:
            return []
        self.published = version
        out: list[do.Effect] = [do.MarkTrained(step=version - 1)] if version - 1 in self.recent else []
        out += [do.Send(peer=peer, message=msg.NewWeights(version=version)) for peer in self.generators]
        return out + self._grant(now)

    # ------------------------------------------------------------- evaluation

    def _evaluate(self, ask: msg.Evaluate, now: float) -> list[do.Effect]:
        if ask.evaluation in self.evaluations:
            return []
        out: list[do.Effect] = []
        members = []
        for problem in ask.problems:
            group = Group(
                group=self.next_group,
                problem=problem,
                split="eval",
                size=ask.samples,
                # not the training stream: every evaluation draws the same noise for the same problem
                seed=group_seed(self.rules.seed ^ 0x5EED, len(members)),
                temperature=ask.temperature,
                admitted_at=now,
                admitted_version=ask.version,
                holder=None,
            )
            self.next_group += 1
            members.append(group)
            self.evaluation_groups[group.group] = (ask.evaluation, group)
            self.evaluation_queue.append(group.group)
            out.append(
                do.AddGroup(
                    group=group.group,
                    problem=problem,
                    split="eval",
                    admitted_version=ask.version,
                    admitted_at=now,
                    generator="",
                )
            )
        self.evaluations[ask.evaluation] = Evaluation(version=ask.version, groups=members, asked_at=now)
        return out + self._grant(now)

    def _fetch_evaluation(self, peer: bytes, evaluation: int, now: float) -> list[do.Effect]:
        found = self.evaluations.get(evaluation)
        if found is None:
            reason = "no such evaluation was asked for"
            return [do.Send(peer=peer, message=msg.Refused(what=f"FetchEvaluation({evaluation})", reason=reason))]
        result = evaluation_result(evaluation, found, now)
        out: list[do.Effect] = []
        if result.finished and not found.recorded:
            found.recorded = True
            for group in found.groups:
                self.evaluation_groups.pop(group.group, None)
            out.append(do.AddEvaluation(result=result, finished_at=now))
        return [*out, do.Send(peer=peer, message=result)]

    # ----------------------------------------------------------------- report

    def _waiting(self, pending: PendingBatch, now: float) -> do.Effect:
        message = msg.Waiting(
            what=f"batch of step {pending.step}", reason=self.wait_reason(now), seconds=now - pending.since
        )
        return do.Send(peer=pending.peer, message=message)

    def wait_reason(self, now: float) -> str:
        """Who the trainer is waiting for, since when."""
        need = self.rules.pace.groups_per_step
        ready = sum(1 for entry in self.order if entry.finished and not entry.trained)
        text = f"{ready} of {need} groups finished"
        open_groups = [g for g in self.groups.values() if not g.complete]
        if open_groups:
            oldest = min(open_groups, key=lambda g: g.group)
            holder = self.generators.get(oldest.holder or b"")
            who = holder.name if holder is not None else "no generator"
            text += (
                f"; oldest is group {oldest.group} on {who}, {now - oldest.admitted_at:.1f} s, "
                f"{len(oldest.samples)}/{oldest.size} samples"
            )
        elif not self.generators:
            text += "; no generator is connected"
        else:
            behind = [f"{g.name} holds version {g.version}" for g in self.generators.values()]
            text += f"; no group is running, newest weights are version {self.published}, {', '.join(behind)}"
        return text

    def _detail(self, now: float) -> dict[str, float]:
        """Counters that go to the trainer with every batch."""
        generators = self.generators.values()
        oldest = min((g.version for g in generators), default=self.published)
        return {
            "slots_used": self.rules.pace.used(live=len(self.groups), step=self.step, version=oldest),
            "slots": self.rules.pace.slots,
            "generators": len(self.generators),
            "generator_busy_seconds": sum(g.busy_seconds for g in generators),
            "tokens_generated": sum(g.tokens_generated for g in generators),
            "groups_admitted": self.counts["groups_admitted"],
            "groups_trained": self.counts["groups_trained"],
            "groups_refused": self.counts["groups_refused"],
            "trajectories_failed": self.counts["trajectories_failed"],
            **{f"{msg.HOLDS}{g.name}": g.version for g in generators},
        }

    def snapshot(self, now: float) -> dict[str, object]:
        """State in plain values, for a person or a monitor."""
        return {
            "step": self.step,
            "published": self.published,
            "live": len(self.groups),
            "waiting_trainer": self.wait_reason(now) if self.pending is not None else "",
            "generators": [
                {"name": g.name, "version": g.version, "held": g.held, "silent_s": now - g.last_heard}
                for g in self.generators.values()
            ],
            "counts": dict(self.counts),
            **self._detail(now),
        }

    def _end(self, reason: str, *, failed: bool) -> list[do.Effect]:
        if self.ended:
            return []
        self.ended = True
        out: list[do.Effect] = [do.Send(peer=peer, message=msg.Stop(reason=reason)) for peer in self.generators]
        return [*out, do.EndRun(reason=reason, failed=failed)]
