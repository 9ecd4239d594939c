"""Whole runs with a sampler on a virtual clock, faults included: invariants 1 to 5 of the design, and every decision is
the one that the trajectories stored until then prescribe."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_sampler import SampledInvariants, sampled_world
from support_world import audit_store, play
from support_world_store import TwinStore


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 40))])
def test_with_a_sampler_nothing_is_lost_and_every_decision_follows_from_what_is_stored(block: int) -> None:
    for seed in range(150 * block, 150 * block + 150):
        play(sampled_world(seed, start="none"))
