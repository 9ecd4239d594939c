"""The experience pool: what it keeps, what it gives, and that its bounds hold whatever happens to the processes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from support_pool import SOME, PoolInvariants, PoolStore, pool_world
from support_world import play
from support_world_store import TwinStore

from async_rl.config.pool import PoolSettings

NAMES = [f"{pool.source} {pool.place}" for pool in SOME]


@pytest.mark.parametrize("pool", SOME, ids=NAMES)
def test_the_invariants_hold_with_a_pool_on_schedules_of_losses_and_restarts(pool: PoolSettings) -> None:
    rows = restored = 0
    for seed in range(10):
        seen = play(pool_world(seed, pool))
        assert isinstance(seen, PoolInvariants)
        rows, restored = rows + seen.seen["rows"], restored + seen.seen["restored"]
    assert rows > 8
    assert restored > 0
