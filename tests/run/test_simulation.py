"""Whole runs on a virtual clock: losses, delays, restarts and reorderings at random moments; invariants watched."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from support_world import FAULTS, REPAIRS, Invariants, play, some_world
from support_world_store import TwinStore


@pytest.mark.parametrize(
    "block", [*range(8), *(pytest.param(block, marks=pytest.mark.nightly) for block in range(8, 50))]
)
def test_two_hundred_schedules_of_losses_delays_restarts_and_reorderings(block: int) -> None:
    """Lying and poisoned generators among them. `make schedules` plays a million."""
    for seed in range(200 * block, 200 * block + 200):
        play(some_world(seed))


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.nightly) for block in range(1, 10))])
def test_the_store_may_be_behind_what_is_decided(block: int) -> None:
    """As with its thread in a run: rounds are stored and answered some time after they were decided, several at once,
    and a death takes with it what nobody was told."""
    for seed in range(100 * block, 100 * block + 100):
        play(some_world(seed, behind_s=(0.02, 0.3, 2.0)[seed % 3]))


def test_a_group_that_is_given_to_a_generator_and_refused_in_one_round_has_no_turns_left() -> None:
    """Permit, Abandon and the deletion of its turns leave together; the generator ends what it has begun anew."""
    seen = play(some_world(3774))
    assert any(reason.startswith("stale") for reason in seen.refused.values())


def test_the_answer_to_a_liars_last_words_is_not_for_the_next_process_of_its_name() -> None:
    """The world stops where an honest generator is told that it lied."""
    assert play(some_world(1578)).counts["generator_quarantined"]


def test_the_real_store_does_the_same_as_the_one_the_schedules_are_played_with(tmp_path: Path) -> None:
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    compared = launches = 0
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        for seed in range(60):
            store = TwinStore(Path(folder) / f"{seed}.sqlite")
            world = some_world(seed, store=store)
            play(world)
            store.real.close()
            compared, launches = compared + store.compared, launches + world.launches
    assert launches > 80
    assert compared > 800


def test_the_same_seed_gives_the_same_story() -> None:
    for seed in range(40, 50):
        first, again = some_world(seed), some_world(seed)
        seen, seen_again = play(first), play(again)
        assert (first.clock.now, first.clock.happened) == (again.clock.now, again.clock.happened)
        assert first.story == again.story
        assert seen.formed == seen_again.formed
        assert seen.answered == seen_again.answered


def test_the_schedules_meet_what_they_are_about() -> None:
    """Losses, restarts and repairs happen often enough for the schedules to say something about them."""
    met: Counter[str] = Counter()
    for seed in range(1000, 1150):
        world = some_world(seed)
        seen: Invariants = play(world)
        met["launches"] += world.launches - 1
        met["messages lost"] += sum(link.lost for link in world.links.values())
        met["steps trained again"] += seen.counts["steps"] - world.plan.steps
        met += Counter({name: world.buffer.core.counts[name] for name in REPAIRS})
        met["frozen"] += seen.counts["generator_lost"]
        met["left"] += seen.counts["generator_left"]
        met["liars found"] += seen.counts["generator_quarantined"]
        met["poison refused"] += seen.counts["problem_refused"]
        met.update(what.split(" ", 1)[1] for what in world.story)
    rare = {
        name: met[name]
        for name in (
            *REPAIRS,
            *FAULTS,
            "launches",
            "messages lost",
            "steps trained again",
            "frozen",
            "liars found",
            "poison refused",
        )
        if met[name] < 3
    }
    assert not rare, (rare, met)
