"""The training groups from admission to the batch: `Ledger`. Each ends in exactly one batch or one refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from async_rl.buffer.sampler import Decision
from async_rl.buffer.staleness import Policy, Slot, SlotQueue
from async_rl.trajectory import Split, Trajectory
from async_rl.trajectory.parts import parts_in
from async_rl.wire.messages import Permit

MOST_REASON = 200
"""characters kept of the reason of a failed trajectory"""


class SampleRecord(Struct, frozen=True, kw_only=True, gc=False):
    """What the buffer remembers of one trajectory; its tokens are in the store. A struct, which is made in an eighth of
    a dataclass's time: there is one for every trajectory that arrives."""

    reward: float
    version_min: int
    version_max: int
    length: int
    """tokens"""
    policy_length: int
    """tokens sampled by the policy"""
    failed: bool
    generator: str = ""
    """that sent it"""
    num_turns: int = 0
    reason: str = ""
    """of a failed one: why, as far as it fits into a line"""
    parts: Mapping[str, float] | None = None
    """named parts of its reward, of held-out problems only"""
    cut: bool = False
    """it is a piece of an episode that goes on"""


@dataclass(slots=True, kw_only=True)
class Group:
    """The trajectories of one prompt that are compared with each other, on their way to a batch."""

    permit: Permit
    """the right to generate it, for all of its samples"""
    admitted_at: float
    """seconds, the buffer's clock"""
    admitted_version: int
    """of the weights that its generator held"""
    position: int = -1
    """in the prompt order; -1: none (evaluation)"""
    attempt: int = 0
    """how often a group of this position was dropped before"""
    holder: bytes | None = None
    """the generator that works on it; None while it waits for one"""
    samples: dict[int, SampleRecord] = field(default_factory=dict)
    """those that have arrived, by their index"""
    begun: set[int] = field(default_factory=set)
    """samples of which finished turns are saved"""
    holders: set[bytes] = field(default_factory=set)
    """every generator it was given to"""
    senders: set[str] = field(default_factory=set)
    """names of the generators that sent trajectories or turns of it"""
    oldest_held: int = 0
    """oldest weights of those generators when it was given to them"""
    decision: Decision | None = None
    """what the sampler chose; None: it asks in the prompt order"""
    restored: bool = False
    """read from the store: it is not known to whom it was given before, nor which weights those held"""
    group: int = field(init=False)
    """its number, unique in the run"""
    size: int = field(init=False)
    """samples asked for"""

    def __post_init__(self) -> None:
        self.group, self.size = self.permit.group, len(self.permit.samples)

    @property
    def problem(self) -> int:
        return self.permit.problem

    @property
    def split(self) -> Split:
        return self.permit.split

    @property
    def missing(self) -> tuple[int, ...]:
        """Samples that have not arrived."""
        return tuple([i for i in self.permit.samples if i not in self.samples])

    @property
    def complete(self) -> bool:
        return len(self.samples) == self.size

    @property
    def cut(self) -> bool:
        """Whether it is a piece of an episode that goes on in another group."""
        return any(sample.cut for sample in self.samples.values())

    @property
    def usable(self) -> list[SampleRecord]:
        """Samples that did not fail."""
        return [s for s in self.samples.values() if not s.failed]

    @property
    def version_min(self) -> int:
        """Version of the oldest policy token of the usable samples; -1 when there is none."""
        return min([s.version_min for s in self.samples.values() if s.version_min >= 0 and not s.failed], default=-1)

    def give(self, peer: bytes, version: int) -> None:
        """To a generator that holds `version`."""
        self.holder = peer
        if not self.restored:
            self.oldest_held = version if not self.holders else min(self.oldest_held, version)
        self.holders.add(peer)

    def permit_missing(self) -> Permit:
        """The right to generate the samples that have not arrived."""
        return replace(self.permit, samples=self.missing, size=self.size)

    def arrive(self, trajectory: Trajectory, sender: str = "") -> bool:
        """Take in one trajectory; False when that sample is here already. `sender`: name of its generator, as the
        buffer knows it; empty: as the trajectory says."""
        if trajectory.sample in self.samples:
            return False
        self.samples[trajectory.sample] = SampleRecord(
            reward=trajectory.reward,
            version_min=trajectory.version_min,
            version_max=trajectory.version_max,
            length=len(trajectory.tokens),
            policy_length=trajectory.num_policy_tokens,
            failed=trajectory.failed,
            generator=sender or trajectory.generator,
            num_turns=len(trajectory.turns),
            reason=trajectory.reason[:MOST_REASON] if trajectory.failed else "",
            parts=parts_in(trajectory.info) if self.split == "eval" else None,
            cut=trajectory.ended == "window",
        )
        return True


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What is admitted, what is finished, what the next batch takes."""

    policy: Policy
    step: int = 0
    """batches formed so far = the step of the next batch"""
    published: int = 0
    """newest version that the trainer has published"""
    next_group: int = 0
    """number of the group admitted next; evaluation groups draw from the same numbers"""
    queue: SlotQueue = field(default_factory=SlotQueue)
    """every group not refused, in order of admission, from the oldest live one on"""
    groups: dict[int, Group] = field(default_factory=dict)
    """those that are in no batch yet, by number"""

    def new_number(self) -> int:
        """A group number that was never used."""
        self.next_group += 1
        return self.next_group - 1

    def admit(self, group: Group) -> None:
        """Append a new group, with the highest number so far."""
        self.groups[group.group] = group
        self.queue.add(Slot(group=group.group, deadline=self.deadline(group)))

    def deadline(self, group: Group) -> int:
        """Latest step at which the oldest token the group has, or may get, is no staler than allowed."""
        # no weights are newer than the next step, whatever a generator says
        oldest = group.version_min if group.complete else min(group.admitted_version, self.step)
        return (oldest if oldest >= 0 else self.step) + self.policy.max_staleness

    def may_admit(self, version: int) -> bool:
        """Whether a generator that holds `version` may start one more group."""
        return self.policy.admit(self.queue, step=self.step, version=version, published=self.published)

    def may_reissue(self, group: int, version: int) -> bool:
        """Whether a generator that holds `version` may take over this admitted group."""
        return self.policy.reissue(self.queue, group, step=self.step, version=version)

    def finish(self, group: int) -> None:
        """All its samples are there: it may be trained."""
        self.queue.finish(group, deadline=self.deadline(self.groups[group]))

    def refuse(self, group: int) -> None:
        """It will not be trained and frees its slot."""
        del self.groups[group]
        self.queue.refuse(group)

    def choose(self) -> list[int] | None:
        """The groups of the next batch, or None while it cannot be filled."""
        return self.policy.select(self.queue, step=self.step)

    def overdue(self) -> list[tuple[int, str]]:
        """(group, reason) of those, finished or not, that can no longer be trained in time."""
        overdue = self.policy.overdue(self.queue, step=self.step)
        return [(group, self._overdue_reason(self.groups[group])) for group in overdue]

    def too_stale(self, chosen: Iterable[int]) -> list[tuple[int, str]]:
        """(group, reason) of those that may not be trained now, whatever admission believed."""
        found = []
        for group in chosen:
            reason = self.policy.refuse(version_min=self.groups[group].version_min, step=self.step)
            if reason is not None:
                found.append((group, reason))
        return found

    def form_batch(self, chosen: Iterable[int]) -> None:
        """These groups are the batch of `step`; the next step begins."""
        for group in chosen:
            del self.groups[group]
        self.queue.train(chosen)
        self.step += 1

    def _overdue_reason(self, group: Group) -> str:
        reason = self.policy.refuse(version_min=group.version_min, step=self.step) if group.complete else None
        done = f"{len(group.samples)} of {group.size} samples finished"
        return reason or (
            f"stale: admitted at version {group.admitted_version}, not finished when step {self.step} was due "
            f"({done}; max_staleness {self.policy.max_staleness})"
        )


def untrainable(group: Group, *, drop_zero_signal: bool) -> str | None:
    """Why a complete group cannot be trained, or None."""
    usable = group.usable
    if len(usable) < min(2, group.size):
        return f"{group.size - len(usable)} of {group.size} trajectories failed"
    if drop_zero_signal and zero_signal(sample.reward for sample in usable):
        return "zero_signal"
    return None


def zero_signal(rewards: Iterable[float]) -> bool:
    """Whether all rewards of a group are equal, so that its group-relative advantages are zero."""
    values = list(rewards)
    return len(values) > 1 and max(values) == min(values)
