"""Builds the buffer's state machine from a run's settings; imports neither sockets nor SQLite."""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.buffer.core import Core
from async_rl.buffer.depth import DepthControl, Rules
from async_rl.buffer.sampler import SamplerRules
from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy, WaitPolicy
from async_rl.config import Settings, pace_of
from async_rl.config.sampler_checks import largest_group, uses_feedback
from async_rl.task.order import PromptOrder


def make_policy(settings: Settings) -> Policy:
    """The policy that keeps a run within its staleness bound, as its settings choose it."""
    depth, window = pace_of(settings)
    groups, staleness = settings.batch.groups_per_step, settings.staleness.max_staleness
    match settings.staleness.policy:
        case "pace":
            return PacePolicy(groups_per_step=groups, max_staleness=staleness, pipeline_depth=depth, window=window)
        case "wait":
            return WaitPolicy(groups_per_step=groups, max_staleness=staleness, pipeline_depth=depth)
        case "drop":
            return DropPolicy(groups_per_step=groups, max_staleness=staleness, pipeline_depth=depth)


def make_control(settings: Settings) -> DepthControl | None:
    """The control that moves the pipeline's depth during the run; None when the depth is fixed."""
    stale, groups = settings.staleness, settings.batch.groups_per_step
    if stale.target_ess == 0:
        return None
    # the window of `pace` takes slots off the bound: depths beyond that would change nothing
    deepest = make_policy(settings).at_depth(stale.max_staleness + 1.0).slots / groups
    return DepthControl(target=stale.target_ess, deepest=max(1.0, deepest), groups_per_step=groups)


def make_sampler(settings: Settings, train_problems: int, sources: Sequence[int]) -> SamplerRules | None:
    """What chooses problems and sizes of groups; None: the prompt order does."""
    if not uses_feedback(settings.sampler):
        return None
    return SamplerRules(
        chosen=settings.sampler,
        seed=settings.seed,
        group_size=settings.batch.group_size,
        largest=largest_group(settings),
        problems=train_problems,
        sources=sources,
    )


def make_core(
    settings: Settings,
    *,
    train_problems: int,
    vocabulary: int,
    run: str = "RUN",
    secret: bytes = b"",
    sources: Sequence[int] = (),
) -> Core:
    """A fresh state machine for a run over `train_problems` training problems. `vocabulary`: size of the tokenizer's
    vocabulary, 0 when it is not known; `run`: the run's folder, for messages; `secret`: decides which trajectories are
    verified; `sources`: number of the source of each problem, where they are told apart."""
    order = PromptOrder(train_problems, settings.seed)
    rules = Rules(
        policy=make_policy(settings),
        control=make_control(settings),
        group_size=settings.batch.group_size,
        temperature=settings.generator.temperature,
        drop_zero_signal=settings.buffer.drop_zero_signal,
        max_failures=settings.buffer.max_failures,
        max_refusals=settings.buffer.max_refusals,
        max_deaths=settings.generator.max_deaths,
        seed=settings.seed,
        pool=settings.pool,
        rollout=settings.rollout,
        vocabulary=vocabulary,
        max_permits=max(1, settings.generator.max_sequences // largest_group(settings)),
        verify_share=settings.verify.share,
        secret=secret,
        frozen_after_s=settings.wire.frozen_after_s,
        stall_report_s=settings.wire.stall_report_s,
        sampler=make_sampler(settings, train_problems, sources),
        absence_s=0.0 if settings.generator.count else settings.generator.start_timeout_s,
        how_to_join="" if settings.generator.count else f": async-rl generate --run {run}",
    )
    return Core(rules, problem_at=order)
