"""What must never happen in a run, watched from outside: at writes, answers and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

if TYPE_CHECKING:
    from support_sim_run import Run


@dataclass(eq=False)
class Watch:
    """Knows what must never happen. It looks at writes, answers and steps, never at the state machine's own books."""

    run: Run
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)
    """training group -> (position, attempt)"""
    refused: dict[int, str] = field(default_factory=dict)
    formed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answered: dict[int, list[Any]] = field(default_factory=dict)
    """batch of each step as it was first sent"""
    stored: set[tuple[int, int]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def committed(self, writes: Sequence[do.Effect]) -> None:
        for effect in writes:
            match effect:
                case do.AddGroup(split="train"):
                    self.ask(effect)
                case do.AddTrajectories(trajectories=many) | do.AddDropped(trajectories=many):
                    for t in many:
                        assert (t.group, t.sample) not in self.stored, "a trajectory is stored once"
                        self.stored.add((t.group, t.sample))
                case do.RefuseGroup(group=group, reason=reason):
                    assert group not in self.refused
                    self.refused[group] = reason
                    stale = reason.startswith("stale")
                    assert self.run.plan.policy.refills or not stale, "nothing admitted gets too old"
                case do.FormBatch(step=step, groups=groups):
                    assert step == len(self.formed)
                    assert len(set(groups)) == self.run.plan.policy.groups_per_step
                    assert not set(groups) & set(self.refused)
                    assert not set(groups) & {g for some in self.formed.values() for g in some}
                    self.formed[step] = groups

    def noted(self, event: str, **detail: object) -> None:
        """A row for events.jsonl."""
        self.counts[event] += 1

    def ask(self, admitted: do.AddGroup) -> None:
        """The prompt order without gap or repeat, or what was dropped, as a further attempt."""
        position, attempt = admitted.position, admitted.attempt
        assert admitted.group not in self.asked
        assert admitted.problem == position
        assert (position, attempt) not in self.asked.values()
        if attempt == 0:
            assert position == 1 + max((p for p, _ in self.asked.values()), default=-1)
        else:
            before = [group for group, place in self.asked.items() if place == (position, attempt - 1)]
            assert [self.refused[group].split(":")[0] for group in before] == ["stale"]
        self.asked[admitted.group] = position, attempt

    def told(self, message: msg.Message) -> None:
        """Nothing is acknowledged that is not in the store, unless its group is given up or of an evaluation."""
        match message:
            case msg.Accepted(pairs=pairs):
                for group, sample in pairs:
                    known = (group, sample) in self.stored
                    assert known or group in self.refused or group not in self.asked, (group, sample)
            case msg.Permits(permits=permits):
                self.counts["permits"] += len(permits)

    def slots(self, core: Core) -> None:
        ended = len(self.refused) + sum(map(len, self.formed.values()))
        assert len(self.asked) - ended <= self.run.plan.policy.slots, "permits stay within the slots"
        held = [group for g in core.admission.generators.values() for group in g.groups]
        assert len(held) == len(set(held)), "a group is in one generator's hands"

    def sent(self, step: int, batch: Sequence[Trajectory]) -> None:
        seen = [(t.group, t.sample, t.versions, t.ended) for t in batch]
        assert self.answered.setdefault(step, seen) == seen, "a batch is answered identically whenever asked"

    def trained(self, step: int, batch: Sequence[Trajectory]) -> None:
        policy = self.run.plan.policy
        assert list(dict.fromkeys(t.group for t in batch)) == list(self.formed[step])
        for t in batch:
            lag = step - t.version_min if t.version_min >= 0 and not t.failed else 0
            assert lag <= policy.max_staleness, f"group {t.group} trained {lag} steps after its weights"
            assert t.version_max <= step, "sampled by weights that did not exist when the batch was formed"
        self.counts["steps"] += 1

    def restored(self, core: Core) -> None:
        """What the store has is what the state machine goes on with."""
        ended = {g for some in self.formed.values() for g in some} | set(self.refused)
        assert set(core.groups) == set(self.asked) - ended
        assert core.step == len(self.formed)

    def audit(self) -> None:
        plan, learned = self.run.plan, self.run.learned
        assert len(learned) == len(set(learned)), "no group is in the weights twice"
        assert learned == [group for step in range(plan.steps) for group in self.formed[step]]
        live = set(self.run.buffer.core.groups)
        batched = {g for some in self.formed.values() for g in some}
        assert set(self.asked) == batched | set(self.refused) | live
        assert not batched & set(self.refused)
        assert not live & (batched | set(self.refused))
        self.audit_prompts(live, batched)
        refusals = self.run.buffer.core.refusals.counts
        assert refusals.keys() <= {"group", "stranger", "number"}, refusals

    def audit_prompts(self, live: set[int], batched: set[int]) -> None:
        """Every position of the prompt order is trained, live, waiting to be asked again, or refused for another
        reason than its age; in exactly one of these."""
        other = [group for group, reason in self.refused.items() if not reason.startswith("stale")]
        places = [self.asked[group][0] for group in (*live, *batched, *other)]
        places += [position for position, _ in self.run.buffer.core.admission.refill]
        assert sorted(places) == list(range(1 + max(position for position, _ in self.asked.values())))
