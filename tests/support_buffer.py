"""State machines of the buffer for tests, what generators answer to their permits, and policies drawn at random."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import strategies as st

from async_rl.buffer.core import Core
from async_rl.buffer.depth import Rules
from async_rl.buffer.staleness import DropPolicy, PacePolicy, Policy, WaitPolicy
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.trajectory.types import group_seed, sample_seed
from async_rl.wire import messages as msg

TRAINER = b"trainer"


def trajectory(group: int, sample: int, version: int, *, split: str = "train", **changes: object) -> Trajectory:
    """What a generator answers to the permit of this training group, while no evaluation took a number."""
    values: dict[str, object] = {
        "group": group,
        "sample": sample,
        "problem": group,
        "split": split,
        "seed": sample_seed(group_seed(0, group), sample),
        "tokens": np.array([1, 2], np.int32),
        "log_behaviour": np.array([0.0, -1.0], np.float32),
        "turns": (Turn(start=1, length=1),),
        "versions": (VersionSpan(version=version, start=1, end=2),),
        "reward": float(Random(31 * group + sample).random() < 0.5),
        "ended": "finished",
    }
    return Trajectory(**{**values, **changes})  # type: ignore[arg-type]


def answer(permit: msg.Permit, sample: int, version: int, **changes: object) -> Trajectory:
    """One trajectory for a permit."""
    asked = {
        "problem": permit.problem,
        "seed": sample_seed(permit.seed, sample),
        "temperature": permit.temperature,
    }
    return trajectory(permit.group, sample, version, split=permit.split, **{**asked, **changes})


def make_core(policy: Policy, **changes: object) -> Core:
    """A fresh state machine that has received the trainer's Hello."""
    values: dict[str, object] = {
        "policy": policy,
        "group_size": 2,
        "temperature": 1.0,
        "drop_zero_signal": False,
        "max_failures": 10**9,
        "max_refusals": 10**9,
        "seed": 0,
    }
    core = Core(Rules(**{**values, **changes}), problem_at=lambda position: position)  # type: ignore[arg-type]
    core.handle(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1), 0.0)
    return core


@st.composite
def paces(draw: st.DrawFn) -> PacePolicy:
    p, k = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    return PacePolicy(
        groups_per_step=p,
        max_staleness=k,
        pipeline_depth=draw(st.floats(1, k + 1)),
        window=draw(st.integers(1, k * p + 1)),
    )


@st.composite
def waits(draw: st.DrawFn) -> WaitPolicy:
    k = draw(st.integers(0, 4))
    return WaitPolicy(
        groups_per_step=draw(st.integers(1, 6)), max_staleness=k, pipeline_depth=draw(st.floats(1, k + 1))
    )


@st.composite
def drops(draw: st.DrawFn) -> DropPolicy:
    k = draw(st.integers(0, 4))
    return DropPolicy(
        groups_per_step=draw(st.integers(1, 6)), max_staleness=k, pipeline_depth=draw(st.floats(1, k + 1))
    )


def policies() -> st.SearchStrategy[Policy]:
    return st.one_of(paces(), waits(), drops())
