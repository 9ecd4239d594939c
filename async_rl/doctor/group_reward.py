"""Whether a task's judge of groups comes to rewards: it is called with a group played by a script."""

from __future__ import annotations

import asyncio
from random import Random

from async_rl.doctor.problems import NotScripted, ScriptedSession, answers_of, play_scripted
from async_rl.finding import Finding, error, ok
from async_rl.generator.group_reward import rewards_of
from async_rl.generator.task_code import describe_error
from async_rl.task.protocol import Problem, Reward, Sample, Task
from async_rl.task.weigh import GROUP, ROLLOUT, Weighed, Weights

SIZE = 4
"""samples of a group"""
NAME = "group reward"


def play_group(
    task: Task, problem: Problem, *, seed: int, weights: Weights | None = None, template: str = ""
) -> list[tuple[Sample, Reward]]:
    """Samples of one problem, right answers and random ones in turn, and what `Task.reward_group` gives each.

    Args:
        weights: of the parts of rewards.
        template: text of the model's chat template.

    Raises what the task raises, RewardError for what is no reward, NotScripted where an agent plays.
    """
    random, weights = Random(seed), weights or Weights()

    async def play() -> list[tuple[Sample, Reward]]:
        await task.setup()
        try:
            samples = [await sample(number) for number in range(SIZE)]
            rewards = await rewards_of(task, problem, [found for found, _ in samples])
            for (_, own), reward in zip(samples, rewards, strict=True):
                weights.check(own + weights.weigh(reward, number=GROUP))
            return [(found, reward) for (found, _), reward in zip(samples, rewards, strict=True)]
        finally:
            await task.teardown()

    async def sample(number: int) -> tuple[Sample, Weighed]:
        session = ScriptedSession(answers_of(task, problem, random, right=number % 2 == 0), template=template)
        own = weights.weigh(await play_scripted(task, problem, session), number=ROLLOUT)
        found = Sample(
            problem=problem,
            said=tuple(session.said),
            transcript=session.transcript,
            number=number,
            reward=own.total,
            parts=own.parts,
            notes=session.notes,
            kept=session.kept,
        )
        return found, own

    return asyncio.run(play())


def judge_group_reward(task: Task, *, seed: int, weights: Weights, template: str = "") -> Finding:
    """Call the judge with a group of the first problem. Arguments are those of `play_group`."""
    try:
        found = play_group(task, task.problems("train")[0], seed=seed, weights=weights, template=template)
    except NotScripted:
        return ok(NAME, "not called: episodes are played by an agent through the endpoint")
    except Exception as failure:  # the task is the user's code
        return error(NAME, f"a group of {SIZE} came to none: {describe_error(failure)}", "mend the group's reward")
    shown = ", ".join(str(reward) for _, reward in found)
    return ok(NAME, f"it gives a group of {SIZE} (right answers and random ones in turn) {shown:.200}")
