"""Whatever is lost, late, twice or in another order: a run goes on, and its invariants hold."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer_world import make_core, policies
from support_lossy_world import LossyWorld

from async_rl.buffer.staleness import Policy


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 3),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    spread=st.sampled_from([1.0, 30.0]),
    deaths=st.integers(0, 3),
    freezes=st.integers(0, 3),
    drop=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_run_heals_from_lost_late_and_doubled_messages_and_from_silent_deaths(
    policy: Policy, generators: int, loss: float, spread: float, deaths: int, freezes: int, drop: bool, seed: int
) -> None:
    core = make_core(policy, drop_zero_signal=drop)
    world = LossyWorld(
        core=core,
        random=Random(seed),
        steps=6,
        generators=generators,
        loss=loss,
        failure=0.0,
        spread=spread,
        deaths=deaths,
        freezes=freezes,
    )
    world.run()
    assert len(world.trained) == len(set(world.trained)) >= 6 * policy.groups_per_step
    assert world.admitted == set(world.trained) | set(world.refused) | set(core.groups)
    assert not set(world.trained) & set(world.refused)
    assert not (set(world.trained) | set(world.refused)) & set(core.groups)
    world.check_prompts()
