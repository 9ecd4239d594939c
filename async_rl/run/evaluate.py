"""Sample episodes of a task from a model, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from async_rl.config import Settings
from async_rl.config.derived import task_limit_s
from async_rl.config.rollout import RolloutSettings
from async_rl.config.teachers import TeacherSettings, teachers_of
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.generator.facilities import Facilities
from async_rl.generator.forks import forks_for
from async_rl.generator.group_reward import GroupJudge, Played
from async_rl.generator.rollout import play_episode
from async_rl.generator.session import EpisodeSession, Ticket, make_tickets
from async_rl.generator.task_code import TaskGuard, run_to_end
from async_rl.generator.teachers import TeacherServers
from async_rl.model.decoder import Decoder
from async_rl.model.huggingface import HuggingFaceDecoder
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Task
from async_rl.task.order import Choice, choose_held_out
from async_rl.task.weigh import Weights, has_group_reward
from async_rl.trajectory import Trajectory
from async_rl.wire.messages import Permit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How episodes are run."""

    max_sequences: int = 256
    max_turns: int = 64
    episode_timeout_s: float = 600.0
    task_timeout_s: float = 60.0
    """of the task or its reward between two turns"""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """of the named parts of a reward"""
    task_slots: Mapping[str, int] = field(default_factory=dict)
    """sizes of the shared slots by name; they override those of the task"""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    teachers: Mapping[str, TeacherSettings] = field(default_factory=dict)
    """whose log-probs the recipe distils"""


def limits_of(settings: Settings) -> Limits:
    """Those of a run's generators."""
    chosen = settings.generator
    return Limits(
        max_sequences=chosen.max_sequences,
        max_turns=chosen.max_turns,
        episode_timeout_s=chosen.episode_timeout_s,
        task_timeout_s=task_limit_s(settings),
        reward_weights=settings.task.reward_weights,
        task_slots=chosen.task_slots,
        rollout=settings.rollout,
        teachers=teachers_of(settings.teachers),
    )


async def sample_episodes(
    engine: Engine,
    task: Task,
    tokenizer: Tokenizer,
    tickets: Sequence[Ticket],
    limits: Limits,
    on_judged: Callable[[Sequence[Trajectory]], None] = lambda _: None,
) -> list[Trajectory]:
    """One trajectory for each ticket, in the tickets' order. Those of one group are judged together where the task
    judges groups. `on_judged`: called with the trajectories of a group as soon as they have their rewards."""

    async def episode(number: int, ticket: Ticket) -> Played:
        if forks is not None:
            ticket = await forks.ticket(forks.planned(ticket))
        session = EpisodeSession(
            engine=engine,
            tokenizer=tokenizer,
            ticket=ticket,
            session_id=number,
            max_context=engine.max_context,
            max_turns=limits.max_turns,
            agents=facilities.agents,
            slots=facilities.slots,
        )
        made, weighed = await play_episode(
            task, session, ticket, timeout_s=limits.episode_timeout_s, guard=guard, weights=weights
        )
        made = made if forks is None else forks.finished(ticket, made)
        return Played(trajectory=made, weighed=weighed, session=session)

    async def group(numbers: Sequence[int]) -> dict[int, Trajectory]:
        if forks is not None:
            forks.expect(tickets[numbers[0]].permit.group, [tickets[number].sample for number in numbers])
        played = await asyncio.gather(*(episode(number, tickets[number]) for number in numbers))
        judged = await judge.judge(played) if has_group_reward(task) else [one.trajectory for one in played]
        if servers.servers:
            judged = await asyncio.gather(*(servers.noted(trajectory) for trajectory in judged))
        on_judged(judged)
        return dict(zip(numbers, judged, strict=True))

    guard, weights = TaskGuard(limit_s=limits.task_timeout_s), Weights(chosen=limits.reward_weights)
    servers, forks = TeacherServers.of(limits.teachers), forks_for(limits.rollout, _largest(tickets))
    judge = GroupJudge(task=task, weights=weights, guard=guard, timeout_s=limits.episode_timeout_s)
    facilities = Facilities(task, limits.max_sequences, limits.task_slots)
    await facilities.open(timeout_s=limits.episode_timeout_s)
    made: dict[int, Trajectory] = {}
    try:
        with guard.alarm():
            for found in await asyncio.gather(*(group(numbers) for numbers in _by_group(tickets))):
                made |= found
    finally:
        await facilities.close()
    return [made[number] for number in range(len(tickets))]


def _largest(tickets: Sequence[Ticket]) -> int:
    """Samples of a group."""
    return max((ticket.sample for ticket in tickets), default=0) + 1


def _by_group(tickets: Sequence[Ticket]) -> Iterable[list[int]]:
    """Places of the tickets of each group."""
    found: dict[int, list[int]] = {}
    for number, ticket in enumerate(tickets):
        found.setdefault(ticket.permit.group, []).append(number)
    return found.values()


def play(
    model: Decoder | HuggingFaceDecoder,
    task: Task,
    tokenizer: Tokenizer,
    tickets: Sequence[Ticket],
    limits: Limits,
    *,
    max_context: int | None = None,
    on_judged: Callable[[Sequence[Trajectory]], None] = lambda _: None,
) -> list[Trajectory]:
    """`sample_episodes` with an embedded engine of its own, in an event loop of its own."""

    async def run() -> list[Trajectory]:
        engine = EmbeddedEngine(model, tokenizer, max_sequences=limits.max_sequences, max_context=max_context)
        try:
            return await sample_episodes(engine, task, tokenizer, tickets, limits, on_judged)
        finally:
            await engine.close()

    return run_to_end(run())


def evaluate(
    model: Decoder | HuggingFaceDecoder,
    task: Task,
    tokenizer: Tokenizer,
    *,
    problems: int,
    samples: int,
    temperature: float,
    seed: int,
    choice: Choice = "spread",
    limits: Limits | None = None,
    max_context: int | None = None,
) -> list[Trajectory]:
    """Episodes on `problems` of the held-out problems, `samples` of each. `choice`: of the problems."""
    numbers = tuple(range(samples))
    tickets = [
        ticket
        for p, problem in enumerate(choose_held_out(problems, len(task.problems("eval")), choice))
        for ticket in make_tickets(
            Permit(group=p, problem=problem, split="eval", samples=numbers, seed=seed, temperature=temperature),
            [(seed << 40) + (p << 12) + s for s in numbers],
        )
    ]
    return play(model, task, tokenizer, tickets, limits or Limits(), max_context=max_context)
