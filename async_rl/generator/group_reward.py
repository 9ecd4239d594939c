"""Group rewards: the finished episodes of a group wait until all its samples are played, are judged together, and are
sent.

A permit that asks for some samples of a group only (the rest is stored) has all of them played again, since the judge
sees whole groups; those that were not asked for are not sent. Turns that a lost generator saved are not sampled anew.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from async_rl.errors import RunFailed
from async_rl.generator.rollout import late_after, outcome_of
from async_rl.generator.session import LONGEST_REASON, EpisodeSession
from async_rl.generator.task_code import TaskGuard, describe_error, is_ours, reason_of, waits_in
from async_rl.task.protocol import Problem, Reward, Sample, Task
from async_rl.task.weigh import GROUP, RewardError, Weighed, Weights, as_reward
from async_rl.trajectory import Trajectory
from async_rl.trajectory.parts import PREFIX, parts_in
from async_rl.wire import messages as msg

STRANGE_CANCEL = "CancelledError: the task or its reward cancelled asyncio tasks that are not its own"


class Played(Struct, frozen=True, eq=False, kw_only=True):
    """A finished episode that waits for the others of its group."""

    trajectory: Trajectory
    weighed: Weighed
    """the reward of `Task.rollout`; of no meaning where the episode failed"""
    session: EpisodeSession
    unsent: Trajectory | None = None
    """its finished turns, where the buffer does not have them yet"""

    def sample(self, problem: Problem) -> Sample:
        """As the group reward sees it."""
        made = self.trajectory
        return Sample(
            problem=problem,
            said=tuple(self.session.said),
            transcript=self.session.transcript,
            ended=made.ended,
            number=made.sample,
            reward=made.reward,
            parts=parts_in(made.info),
            notes={name: value for name, value in made.info.items() if not name.startswith(PREFIX)},
            kept=self.session.kept,
        )


async def rewards_of(task: Task, problem: Problem, samples: Sequence[Sample]) -> Sequence[Reward]:
    """What `Task.reward_group` gives these samples. Raises RewardError when it is not a reward for each."""
    rewards: Any = task.reward_group(problem, samples)
    if inspect.isawaitable(rewards):
        rewards = await rewards
    if isinstance(rewards, str | dict) or not hasattr(rewards, "__len__") or len(rewards) != len(samples):
        raise RewardError(f"reward_group returned {rewards!r:.100}, not a list of {len(samples)} rewards")
    found: Sequence[Reward] = rewards
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJudge:
    """Calls `Task.reward_group`."""

    task: Task
    weights: Weights
    guard: TaskGuard
    timeout_s: float

    async def judge(self, played: Sequence[Played]) -> list[Trajectory]:
        """The trajectories of a whole group with their final rewards, in the order given.

        Whatever the judge raises, or that it takes too long, ends all trajectories that had not failed already, with
        the reason. Raises what a person or the launcher orders.
        """
        good = [one for one in played if not one.trajectory.failed]
        if not good:
            return [one.trajectory for one in played]
        work, limit = self._called(good), min(self.guard.limit_s or self.timeout_s, self.timeout_s)

        def overrun() -> str:
            where = f" in {place}" if (place := waits_in(work)) else ""
            return f"it took more than {limit:g} s (generator.task_timeout_s){where}"

        outcome = await outcome_of(self.guard, work, late_after(limit, overrun))
        if isinstance(outcome, BaseException):
            judged = [_failed(one.trajectory, f"the group's reward: {reason_of(outcome)}") for one in good]
        else:
            judged = [_rewarded(one.trajectory, found) for one, found in zip(good, outcome, strict=True)]
        by_number = {trajectory.sample: trajectory for trajectory in judged}
        return [by_number.get(one.trajectory.sample, one.trajectory) for one in played]

    async def _called(self, good: Sequence[Played]) -> list[Weighed]:
        """The final rewards of the episodes."""
        first = good[0].trajectory
        problem = self.task.problems(first.split)[first.problem]
        samples = [one.sample(problem) for one in sorted(good, key=lambda one: one.trajectory.sample)]
        rewards = await rewards_of(self.task, problem, samples)
        by_number = {sample.number: reward for sample, reward in zip(samples, rewards, strict=True)}
        return [self._summed(one.weighed, by_number[one.trajectory.sample]) for one in good]

    def _summed(self, own: Weighed, reward: Reward) -> Weighed:
        """The reward of the episode and that of the group together."""
        found = own + self.weights.weigh(reward, number=GROUP)
        as_reward(found.total, "the sum of the rewards of rollout and group is")
        self.weights.check(found)
        return found


def _rewarded(trajectory: Trajectory, found: Weighed) -> Trajectory:
    info = {**trajectory.info, **{f"{PREFIX}{name}": value for name, value in found.parts.items()}}
    return replace(trajectory, reward=found.total, info=info)


def _failed(trajectory: Trajectory, reason: str) -> Trajectory:
    return replace(trajectory, reward=0.0, ended="error", reason=reason[:LONGEST_REASON])


@dataclass(slots=True, kw_only=True, eq=False)
class WaitingGroup:
    """A group whose samples are being played, or judged."""

    wanted: frozenset[int]
    """samples to be sent"""
    size: int
    """samples that are played: the whole group"""
    played: list[Played] = field(default_factory=list)
    judging: asyncio.Task[None] | None = None


@dataclass(slots=True, kw_only=True)
class WaitingGroups:
    """The groups of one generator whose samples wait for each other."""

    judge: GroupJudge
    on_finished: Callable[[Trajectory], None]
    on_failure: Callable[[RunFailed], None]
    waiting: dict[int, WaitingGroup] = field(default_factory=dict)

    def open(self, permit: msg.Permit, samples: Sequence[int]) -> tuple[int, ...]:
        """The samples to play so that `samples` can be judged: the whole group, or none where it is in hand."""
        if permit.group in self.waiting or not samples:
            return ()
        size = permit.size or len(permit.samples)
        self.waiting[permit.group] = WaitingGroup(wanted=frozenset(samples), size=size)
        return tuple(range(size)) if permit.size else permit.samples

    def add(self, played: Played) -> bool:
        """Keep a finished episode until its group is complete; False when it does not wait."""
        group = self.waiting.get(played.trajectory.group)
        if group is None:
            return False
        group.played.append(played)
        if len(group.played) == group.size:
            group.judging = asyncio.create_task(self._judge(played.trajectory.group, group))
        return True

    def abandon(self, groups: Iterable[int]) -> None:
        """The buffer does not want these groups any more: what is finished goes out as aborted, what still runs will
        not wait."""
        for number in groups:
            group = self.waiting.pop(number, None)
            if group is None:
                continue
            if group.judging is not None:
                group.judging.cancel()
            unwanted = [replace(p.trajectory, reward=0.0, ended="aborted", reason=msg.ABANDONED) for p in group.played]
            self._send(group, unwanted)

    def take_unsent(self) -> list[Trajectory]:
        """Turns of waiting episodes to be saved by the buffer, which count as sent."""
        taken: list[Trajectory] = []
        for group in self.waiting.values():
            for place, played in enumerate(group.played):
                if played.unsent is not None:
                    taken.append(played.unsent)
                    group.played[place] = replace(played, unsent=None)
        return taken

    def sessions(self) -> list[EpisodeSession]:
        """Of the waiting episodes that are to be sent."""
        return [
            played.session
            for group in self.waiting.values()
            for played in group.played
            if played.trajectory.sample in group.wanted
        ]

    def keys(self) -> set[tuple[int, int]]:
        """(group, sample) of the waiting episodes."""
        return {(number, one.trajectory.sample) for number, group in self.waiting.items() for one in group.played}

    def cancel(self) -> list[asyncio.Task[None]]:
        """Give up all groups; returns what is to be waited for."""
        tasks = [group.judging for group in self.waiting.values() if group.judging is not None]
        self.waiting.clear()
        for task in tasks:
            task.cancel()
        return tasks

    async def _judge(self, number: int, group: WaitingGroup) -> None:
        try:
            made = await self.judge.judge(tuple(group.played))
        except asyncio.CancelledError:
            if self.waiting.get(number) is not group:  # it was given up
                raise
            made = [one.trajectory if one.trajectory.failed else _failed(one.trajectory, STRANGE_CANCEL)
                    for one in group.played]  # fmt: skip
        except BaseException as error:
            reason = f"the reward of group {number} could not be had: {describe_error(error)}"
            self.on_failure(error if isinstance(error, RunFailed) else RunFailed(reason))
            if is_ours(error):
                raise
            return
        if self.waiting.get(number) is group:
            del self.waiting[number]
            self._send(group, made)

    def _send(self, group: WaitingGroup, trajectories: Iterable[Trajectory]) -> None:
        for trajectory in trajectories:
            if trajectory.sample in group.wanted:
                self.on_finished(trajectory)
