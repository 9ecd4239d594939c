"""Whole runs with rollout plans and teachers on a virtual clock, faults included: invariants 1 to 5 of the design, a
fork is credited only to the tokens that it went through, and what a teacher said of a token is trained with it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from support_forks import ForkedInvariants, Forking, forked_world
from support_world import deaths, make_world, play, some_policy
from support_world_store import TwinStore

from async_rl.config.rollout import RolloutSettings
from async_rl.instruments.world.clock import Network


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 50))])
def test_with_forks_and_teachers_nothing_is_lost_or_credited_to_other_tokens(block: int) -> None:
    met: Counter[str] = Counter()
    for seed in range(80 * block, 80 * block + 80):
        world = forked_world(seed)
        seen = play(world)
        assert isinstance(seen, ForkedInvariants)
        met += seen.met
        met["launches"] += world.launches - 1
    if not block:
        assert all(met[kind] > 5 for kind in ("forks", "taught", "launches")), met


def test_a_fork_whose_parent_was_lost_and_sampled_anew_begins_with_the_prompt() -> None:
    """Its parent was finished but not delivered when their generator died; another one has played it since."""
    plan, met = RolloutSettings(roots=1, shape="tree", fork="even"), Counter[str]()
    for seed in range(24):
        policy = some_policy(Random(seed))
        world = make_world(
            policy, seed=seed, steps=5, generators=2, group_size=3, groups_at_once=1, rollout=plan, save_every=1,
            network=Network(delay_s=0.05, loss=0.3), faults=deaths("kill generator", 10, seed, until_s=16.0),
            watch=ForkedInvariants(policy=policy), decoder=lambda **values: Forking(plan=plan, **values),
        )  # fmt: skip
        seen = play(world)
        assert isinstance(seen, ForkedInvariants)
        met += seen.met
    assert met["parent sampled anew"] > 2, met
    assert met["forks"] > 100, met


def test_the_real_store_keeps_forks_and_notes_as_the_fake_one_does(tmp_path: Path) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    compared = 0
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for seed in range(8):
            store = TwinStore(Path(folder) / f"{seed}.sqlite")
            play(forked_world(seed, store=store))
            store.real.close()
            compared += store.compared
    assert compared > 60
