"""The experience pool: what it keeps, what it gives, and that its bounds hold whatever happens to the processes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_pool import SOME, PoolInvariants, PoolStore, pool_world
from support_world import play
from support_world_store import TwinStore

from async_rl.buffer.ledger import SampleRecord
from async_rl.buffer.pool import HISTORY, FreshGroup, Member, Pool, share_of
from async_rl.config.pool import PoolSettings
from async_rl.trajectory.reuse import POOL_GROUPS, Drawn

NAMES = [f"{pool.source} {pool.place}" for pool in SOME]


# ---------------------------------------------------------------- whole runs on a virtual clock


@pytest.mark.parametrize("pool", SOME, ids=NAMES)
def test_the_invariants_hold_with_a_pool_on_schedules_of_losses_and_restarts(pool: PoolSettings) -> None:
    rows = restored = 0
    for seed in range(6):
        seen = play(pool_world(seed, pool))
        assert isinstance(seen, PoolInvariants)
        rows, restored = rows + seen.seen["rows"], restored + seen.seen["restored"]
    assert rows > 4
    assert restored > 0


@st.composite
def pools(draw: st.DrawFn) -> PoolSettings:
    """Settings that config/pool_checks.py lets pass, as far as they concern the buffer."""
    source = draw(st.sampled_from(("groups", "successes", "best", "priority")))
    place = "extra" if source == "groups" else draw(st.sampled_from(("extra", "join", "replace", "instead")))
    when = "always" if place == "extra" else draw(st.sampled_from(("failed", "no_signal")))
    if place == "join":
        when = draw(st.sampled_from(("always", "failed", "no_signal")))
    return PoolSettings(
        source=source,  # type: ignore[arg-type]
        place=place,  # type: ignore[arg-type]
        when=when,  # type: ignore[arg-type]
        gate=draw(st.sampled_from((0.0, 0.5, 1.0))) if when != "always" else 0.0,
        rows=draw(st.integers(1, 3)) if place != "replace" else draw(st.integers(1, 2)),
        share=draw(st.sampled_from((0.0, 0.3, 0.6))) if place == "extra" else 0.0,
        priority=draw(st.sampled_from(("signal", "advantage", "reward", "recency"))),
        max_age=draw(st.integers(0, 5)),
        max_uses=draw(st.integers(0, 2)),
        per_problem=draw(st.integers(1, 4)),
        size=draw(st.integers(3, 30)),
        until=draw(st.sampled_from((0, 0, 4))),
    )


@settings(max_examples=60, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1_000_000), pool=pools())
def test_the_invariants_hold_for_any_pool_and_schedule(seed: int, pool: PoolSettings) -> None:
    play(pool_world(seed, pool))


@pytest.mark.nightly
@settings(max_examples=3000, derandomize=False, deadline=None)
@given(seed=st.integers(0, 1_000_000_000), pool=pools())
def test_the_invariants_hold_for_very_many(seed: int, pool: PoolSettings) -> None:
    play(pool_world(seed, pool))


def test_the_real_store_does_the_same_as_the_one_the_schedules_are_played_with(tmp_path: Path) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    compared = rows = 0
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for seed in range(20):
            store = TwinStore(Path(folder) / f"{seed}.sqlite")
            store.fake = PoolStore()
            store.real.store.make_pool()
            store.real.store.commit()
            seen = play(pool_world(seed, SOME[seed % len(SOME)], store=store))
            store.real.close()
            assert isinstance(seen, PoolInvariants)
            compared, rows = compared + store.compared, rows + seen.seen["rows"]
    assert compared > 200
    assert rows > 20


# ---------------------------------------------------------------- what is kept and what comes back


def group(number: int, problem: int, rewards: list[float], *, version: int = 0, generator: str = "a") -> FreshGroup:
    samples = {
        i: SampleRecord(
            reward=reward, version_min=version, version_max=version, length=4, policy_length=2, failed=False,
            generator=generator,
        )
        for i, reward in enumerate(rewards)
    }  # fmt: skip
    return FreshGroup(group=number, problem=problem, size=len(rewards), samples=samples)


def filled(chosen: PoolSettings, *groups: FreshGroup) -> Pool:
    pool = Pool(settings=chosen, seed=1)
    pool.add(groups)
    return pool


def names(drawn: Drawn) -> list[tuple[int, int]]:
    return [(row.group, row.sample) for row in drawn.rows]


def test_successes_are_those_above_the_bound_and_the_newest_of_each_problem() -> None:
    chosen = PoolSettings(source="successes", above=0.4, per_problem=2, rows=9)
    pool = filled(chosen, group(0, 5, [1.0, 0.0, 0.5]), group(1, 5, [1.0, 0.4]), group(2, 6, [0.0, 0.0]))
    assert set(pool.members) == {(0, 2), (1, 0)}
    assert sorted(names(pool.draw(3, []))) == [(0, 2), (1, 0)]


def test_the_best_of_a_problem_stay_and_come_first() -> None:
    chosen = PoolSettings(source="best", place="join", per_problem=2, rows=1)
    pool = filled(chosen, group(0, 5, [0.9, 0.2]), group(1, 5, [0.5, 0.3]), group(2, 6, [1.0, 0.0]))
    assert sorted(pool.members) == [(0, 0), (1, 0), (2, 0)]
    drawn = pool.draw(3, [group(7, 5, [0.0, 0.0]), group(8, 4, [0.0, 0.0]), group(9, 6, [1.0, 1.0])])
    assert names(drawn) == [(0, 0), (2, 0)]
    assert [(row.as_group, row.as_sample) for row in drawn.rows] == [(7, 2), (9, 2)]
    assert drawn.out == ()


def test_a_failed_group_gets_a_success_in_place_of_its_last_sample() -> None:
    chosen = PoolSettings(source="successes", place="replace", when="no_signal", gate=0.2)
    pool = filled(chosen, group(0, 5, [1.0, 0.0]), group(1, 6, [1.0, 0.0]))
    fresh = [group(7, 5, [0.0, 0.0, 0.0]), group(8, 6, [1.0, 1.0, 1.0]), group(9, 6, [0.0, 0.1, 0.0])]
    drawn = pool.draw(3, fresh)
    assert names(drawn) == [(0, 0)], "only that without signal and below the gate"
    assert drawn.out == ((7, 2),)
    failed = Pool(settings=PoolSettings(source="successes", place="replace", when="failed", gate=0.2), seed=1)
    failed.add([group(0, 5, [1.0, 0.0]), group(1, 6, [1.0, 0.0])])
    assert names(failed.draw(3, fresh)) == [(0, 0), (1, 0)]


def test_a_group_without_signal_gives_its_place_to_samples_of_any_problem() -> None:
    chosen = PoolSettings(source="priority", place="instead", when="no_signal", gate=1.0, rows=2)
    pool = filled(chosen, group(0, 5, [1.0, 0.0]), group(1, 6, [1.0, 1.0]))
    assert sorted(pool.members) == [(0, 0), (0, 1)], "a group of equal rewards has no signal"
    drawn = pool.draw(3, [group(7, 9, [1.0, 1.0]), group(8, 9, [1.0, 0.0]), group(9, 9, [0.0, 0.0])])
    assert sorted(names(drawn)) == [(0, 0), (0, 1)], "nobody comes back twice at a step"
    assert drawn.out == ((7, 0), (7, 1)), "and nothing is left for the other one, which stays"
    assert [row.as_group for row in drawn.rows] == [POOL_GROUPS, POOL_GROUPS + 1]
    assert [abs(row.advantage) for row in drawn.rows] == pytest.approx([math.sqrt(0.5)] * 2, rel=1e-5)


def test_whole_groups_come_back_together_least_used_first() -> None:
    chosen = PoolSettings(source="groups", rows=1)
    pool = filled(chosen, group(0, 5, [1.0, 0.0]), group(1, 6, [1.0, 1.0]), group(2, 7, [0.0, 1.0]))
    seen = []
    for step in range(3, 7):
        drawn = pool.draw(step, [])
        pool.use(drawn.rows)
        seen.append(names(drawn)[0][0])
        assert names(drawn) == [(seen[-1], 0), (seen[-1], 1)]
        assert {row.as_group for row in drawn.rows} == {POOL_GROUPS + seen[-1]}
    assert Counter(seen) == {0: 2, 2: 2}
    assert set(seen[:2]) == {0, 2}


def test_shares_are_of_the_whole_batch() -> None:
    assert [share_of(share, 8) for share in (0.0, 0.2, 0.4, 0.5, 0.6)] == [0, 2, 5, 8, 12]
    pool = filled(PoolSettings(source="successes", share=0.5), *(group(i, i, [1.0, 1.0]) for i in range(9)))
    assert len(pool.draw(5, [group(20, 0, [0.0, 0.0, 0.0]), group(21, 1, [1.0, 0.0, 0.0])]).rows) == 6


def test_priority_draws_in_proportion() -> None:
    chosen = PoolSettings(source="priority", priority="reward", rows=1)
    pool = filled(chosen, group(0, 0, [1.0, 3.0]), group(1, 1, [6.0, 0.0]))
    count = Counter(names(pool.draw(step, []))[0] for step in range(4000))
    assert count[0, 0] / 4000 == pytest.approx(0.1, abs=0.02)
    assert count[0, 1] / 4000 == pytest.approx(0.3, abs=0.03)
    assert count[1, 0] / 4000 == pytest.approx(0.6, abs=0.03)
    assert (1, 1) not in count


def test_age_and_uses_end_what_may_come_back_and_a_liars_rows_leave() -> None:
    pool = filled(
        PoolSettings(source="successes", max_age=3, max_uses=2, rows=9),
        group(0, 0, [1.0], version=1), group(1, 1, [1.0], version=2), group(2, 2, [1.0], version=2, generator="b"),
    )  # fmt: skip
    pool.expire(4)
    assert len(pool.members) == 3
    pool.use(pool.draw(4, []).rows)
    pool.expire(5)
    assert sorted(pool.members) == [(1, 0), (2, 0)], "version 1 is four steps old"
    remembered = pool.forget("b", 5)
    pool.expire(5)
    assert sorted(pool.members) == [(1, 0)]
    again = filled(PoolSettings(source="successes", rows=9), group(2, 2, [1.0], generator="b"))
    again.restore(remembered)  # type: ignore[arg-type]
    again.expire(5)
    assert not again.members
    pool.use(pool.draw(5, []).rows)
    pool.expire(5)
    assert not pool.members, "used twice"


def test_nothing_comes_back_until_enough_is_there_and_then_all_does() -> None:
    pool = filled(PoolSettings(source="successes", flush_at=3, max_uses=1), group(0, 0, [1.0, 1.0]))
    assert not pool.draw(1, [])
    pool.add([group(1, 1, [1.0, 0.0])])
    drawn = pool.draw(2, [])
    assert sorted(names(drawn)) == [(0, 0), (0, 1), (1, 0)]
    pool.use(drawn.rows)
    pool.expire(3)
    assert not pool.members


def test_the_medians_are_those_of_the_newest_groups() -> None:
    """SPEAR: R - P50 of the groups' means, here (.25, .5, .5, .75, .9)."""
    means = ([0.0, 0.5], [0.5, 0.5], [0.0, 1.0], [0.5, 1.0], [0.9, 0.9])
    pool = filled(PoolSettings(source="successes"), *(group(i, i, rewards) for i, rewards in enumerate(means)))
    row = pool.draw(6, []).rows[0]
    assert row.baseline == 0.5
    assert row.scale == pytest.approx(math.sqrt(0.125))
    assert pool.history.maxlen == HISTORY == 10240


def test_demonstrations_come_back_in_turn() -> None:
    pool = Pool(settings=PoolSettings(source="demonstrations", rows=2), seed=0)
    pool.know([Member(group=0, sample=i, problem=i % 2, reward=1.0, oldest=-1) for i in range(4)])
    seen: list[tuple[int, int]] = []
    for step in range(4):
        drawn = pool.draw(step, [])
        pool.use(drawn.rows)
        pool.expire(step + 1)
        seen += names(drawn)
        assert all(row.age == 0 for row in drawn.rows)
    assert Counter(seen) == {(0, i): 2 for i in range(4)}


def test_the_end_of_the_pool_is_the_step_that_is_named() -> None:
    pool = filled(PoolSettings(source="successes", until=4), group(0, 0, [1.0]))
    assert pool.draw(3, [])
    assert not pool.draw(4, [])


@given(seed=st.integers(0, 1000), step=st.integers(0, 1000))
def test_a_draw_depends_on_seed_step_and_contents_alone(seed: int, step: int) -> None:
    chosen = PoolSettings(source="priority", rows=3)
    groups = [group(i, i, [1.0, 0.0, 0.3]) for i in range(5)]
    first, again = Pool(settings=chosen, seed=seed), Pool(settings=chosen, seed=seed)
    first.add(groups)
    for one in groups:
        again.add([one])
    assert first.draw(step, []) == again.draw(step, []) == first.draw(step, [])
