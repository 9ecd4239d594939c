"""Whatever is lost, late, twice or in another order: a run goes on, and its invariants hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import policies
from support_world import deaths, make_world, play

from async_rl.buffer.staleness import Policy
from async_rl.instruments.world.clock import Network


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 3),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    spread=st.sampled_from([1.0, 30.0]),
    silent=st.integers(0, 3),
    freezes=st.integers(0, 3),
    drop=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_run_heals_from_lost_late_and_doubled_messages_and_from_silent_deaths(
    policy: Policy, generators: int, loss: float, spread: float, silent: int, freezes: int, drop: bool, seed: int
) -> None:
    world = make_world(
        policy,
        seed=seed,
        steps=6,
        generators=generators,
        evaluate_every=2,
        drop_zero_signal=drop,
        spread=spread,
        network=Network(delay_s=0.05, loss=loss, double=loss / 2, ordered=False),
        faults=(
            *deaths("vanish generator", silent, seed),
            *deaths("kill generator", silent, seed + 1),
            *deaths("freeze generator", freezes, seed + 2),
        ),
    )
    seen, core = play(world), world.buffer.core
    trained = seen.batched
    assert len(trained) == len(set(trained)) >= 6 * policy.groups_per_step
    assert set(seen.asked) == set(trained) | set(seen.refused) | set(core.groups)
    assert not set(trained) & set(seen.refused)
    assert not (set(trained) | set(seen.refused)) & set(core.groups)
    seen.check_prompts(core)
