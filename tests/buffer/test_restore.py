"""A buffer killed at any moment comes back from its store and goes on as if nothing had been."""

from __future__ import annotations

import heapq
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import TRAINER, make_core, policies
from support_world import ON_ITS_OWN, audit_store, deaths, durable, make_world, play
from support_world_store import RealStore

from async_rl.buffer.loop import write
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.staleness import PacePolicy, Policy
from async_rl.buffer.store import Store
from async_rl.wire import messages as msg


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 3),
    loss=st.booleans(),
    failure=st.sampled_from([0.0, 0.05]),
    spread=st.sampled_from([1.0, 30.0]),
    drop=st.booleans(),
    every=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_after_deaths_at_any_moment_every_admitted_group_is_trained_once_within_the_bound(
    policy: Policy, generators: int, loss: bool, failure: float, spread: float, drop: bool, every: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        world = make_world(
            policy,
            seed=seed,
            steps=8,
            generators=generators,
            **ON_ITS_OWN,
            store=RealStore(Path(folder) / "trajectories.sqlite"),
            save_every=every,
            drop_zero_signal=drop,
            failure=failure,
            spread=spread,
            faults=(*deaths("kill buffer", 4, seed), *deaths("kill generator", 12 if loss else 0, seed + 1)),
        )
        play(world)
        audit_store(world)


def test_a_store_without_anything_gives_a_fresh_buffer(tmp_path: Path) -> None:
    pace = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1)
    core = make_core(pace)
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        restore(core, read_state(store), version=0)
    assert durable(core) == durable(make_core(pace))


def test_restored_groups_keep_their_seeds_whatever_evaluations_took_numbers_in_between(tmp_path: Path) -> None:
    pace = PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0, window=1)
    core = make_core(pace)
    again = make_core(pace)
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        ask = msg.Evaluate(evaluation=0, version=0, problems=(5, 6, 7), samples=2, temperature=0.0)
        effects = core.handle(TRAINER, ask, 0.0)
        effects += core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
        effects += core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
        for effect in effects:
            write(effect, store)
        restore(again, read_state(store), version=0)
    assert {g.group: g.permit.seed for g in again.groups.values()} == {
        g.group: g.permit.seed for g in core.groups.values()
    }
    assert again.ledger.next_group == core.ledger.next_group == 5
    assert heapq.nsmallest(2, again.admission.orphans) == [3, 4]
