"""Schedules drawn at random: a run, and what goes wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from support_sim_run import Plan

from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy, WaitPolicy

FAULTS = (
    "kill buffer",
    "kill buffer",
    "kill trainer",
    "kill launcher",
    "kill generator",
    "kill generator",
    "freeze generator",
    "freeze trainer",
    "freeze buffer",
    "leave generator",
    "vanish generator",
    "join generator",
    "cut generator",
    "cut generator",
    "cut trainer",
    "slow",
)


REPAIRS = ("permits_again", "groups_reissued", "episodes_resumed", "trajectories_ignored", "refused_stale")


def some_policy(random: Random) -> Policy:
    p, k = random.randint(1, 3), random.randint(0, 3)
    depth = random.uniform(1, k + 1)
    match random.randrange(3):
        case 0:
            window = random.randint(1, k * p + 1)
            return PacePolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth, window=window)
        case 1:
            return WaitPolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth)
        case _:
            return DropPolicy(groups_per_step=p, max_staleness=k, pipeline_depth=depth)


def some_plan(seed: int, kinds: Sequence[str] = FAULTS) -> Plan:
    """`kinds`: what may go wrong."""
    random = Random(seed)
    several = random.choice((0, 3, 6, 12))
    faults = sorted((random.uniform(0, 16), random.choice(kinds)) for _ in range(several))
    return Plan(
        seed=seed,
        policy=some_policy(random),
        group_size=random.randint(1, 3),
        generators=random.randint(1, 3),
        room=random.randint(1, 3),
        steps=random.randint(3, 7),
        every=random.randint(1, 3),
        evaluate_every=random.choice((0, 0, 2)),
        drop_zero_signal=random.random() < 0.3,
        failure=random.choice((0.0, 0.0, 0.1)),
        spread=random.choice((1.0, 30.0)),
        delay=random.choice((0.01, 0.1)),
        faults=tuple(faults),
    )
