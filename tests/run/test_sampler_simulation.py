"""Whole runs with a sampler on a virtual clock, faults included: invariants 1 to 5 of the design, and every decision is
the one that the trajectories stored until then prescribe."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from support_sampler import SampledInvariants, sampled_world
from support_world import play
from support_world_store import TwinStore


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 100))])
def test_with_a_sampler_nothing_is_lost_and_every_decision_follows_from_what_is_stored(block: int) -> None:
    """A buffer that comes back knows the same numbers to the last bit (support_world.durable)."""
    met: Counter[str] = Counter()
    for seed in range(60 * block, 60 * block + 60):
        world = sampled_world(seed)
        seen = play(world)
        assert isinstance(seen, SampledInvariants)
        met["launches"] += world.launches - 1
        met["in band"] += any(reason.startswith("out_of_band") for reason in seen.refused.values())
        met["further attempts"] += any(added.attempt for added in seen.admitted.values())
        for decision in seen.decisions.values():
            met["ragged"] += decision.samples != seen.rules.group_size
            met["fewer turns"] += 0 < decision.max_turns < 5
            met[f"start {decision.start.source}" if decision.start is not None else "no start"] += 1
    if block:
        return
    kinds = ("launches", "in band", "further attempts", "ragged", "fewer turns", "start success", "start failure")
    assert all(met[kind] > 1 for kind in kinds), met


def test_the_real_store_keeps_decisions_outcomes_and_starts_as_the_fake_one_does(tmp_path: Path) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    compared = 0
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for seed in range(12):
            store = TwinStore(Path(folder) / f"{seed}.sqlite")
            play(sampled_world(seed, store=store, start="success"))
            store.real.close()
            compared += store.compared
    assert compared > 100


def test_the_same_seed_decides_the_same() -> None:
    for seed in range(40, 44):
        first, again = play(sampled_world(seed)), play(sampled_world(seed))
        assert isinstance(first, SampledInvariants)
        assert isinstance(again, SampledInvariants)
        assert first.decisions == again.decisions


def test_what_arrives_late_of_a_poisoned_group_is_counted_as_after_a_restart() -> None:
    """It was refused while it ran, for its problem and not for its age."""
    seen = play(sampled_world(134))
    assert any(reason.startswith("poison") for reason in seen.refused.values())
