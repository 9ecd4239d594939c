from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_run import quick_settings

from async_rl.config.schema import to_yaml
from async_rl.run.resume import resumed_settings
from async_rl.run_folder import RunFolder
from async_rl.task.order import PromptOrder, choose_held_out

GOLDEN = (2175, 4822, 3792, 4434, 861, 2604)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_every_epoch_asks_every_problem_once(n: int, seed: int, epoch: int) -> None:
    order = PromptOrder(n, seed)
    assert sorted(order(epoch * n + i) for i in range(n)) == list(range(n))


@given(positions=st.lists(st.integers(0, 500), max_size=30), seed=st.integers(0, 9))
def test_a_position_means_the_same_problem_whatever_was_asked_before(positions: list[int], seed: int) -> None:
    used = PromptOrder(37, seed)
    assert [used(p) for p in positions] == [PromptOrder(37, seed)(p) for p in positions]


def test_epochs_and_seeds_differ() -> None:
    order, other = PromptOrder(100, 0), PromptOrder(100, 1)
    assert order.stretch(90, 215) == [order(position) for position in range(90, 305)]
    first = [order(i) for i in range(100)]
    assert first != [order(100 + i) for i in range(100)]
    assert first != [other(i) for i in range(100)]


def test_the_order_of_this_version_is_the_order_of_the_next() -> None:
    # A stored run is resumed by position alone, so these numbers may never change.
    assert [PromptOrder(10, 7)(i) for i in range(20)] == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1, 1, 3, 2, 7, 8, 4, 5, 9, 0, 6]


def test_problems_are_spread_evenly_over_the_places_of_an_epoch() -> None:
    order = PromptOrder(5, 3)
    count = np.zeros((5, 5))
    for position in range(5 * 2000):
        count[position % 5, order(position)] += 1
    assert abs(count / 2000 - 0.2).max() < 0.05


def test_memory_does_not_grow_with_the_epochs() -> None:
    order = PromptOrder(10, 0)
    for position in range(0, 1000, 7):
        order(position)
    assert len(order._epochs) <= 2


@pytest.mark.parametrize(("n", "seed", "position"), [(0, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_impossible_orders_are_refused(n: int, seed: int, position: int) -> None:
    with pytest.raises(ValueError):
        PromptOrder(n, seed)(position)


def test_held_out_problems_are_spread_over_a_sorted_file_and_always_the_same() -> None:
    """A file with five subjects one after the other, as MATH has them."""
    chosen = choose_held_out(64, 5000, "spread")
    assert len(set(chosen)) == 64
    assert {number // 1000 for number in chosen} == set(range(5))
    assert min(np.bincount([number // 1000 for number in chosen])) >= 6
    assert choose_held_out(128, 5000, "spread")[:64] == chosen
    assert chosen[:6] == GOLDEN


def test_all_held_out_problems_or_the_first_ones_stay_in_order() -> None:
    assert choose_held_out(9, 5, "spread") == (0, 1, 2, 3, 4) == choose_held_out(5, 5, "spread")
    assert choose_held_out(3, 5, "first") == (0, 1, 2)
    assert choose_held_out(4, 0, "spread") == ()


def test_a_run_older_than_the_choice_goes_on_with_the_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settings = quick_settings(tmp_path, "evaluation.problems=7")
    folder.config.write_text(to_yaml(settings))
    assert folder.settings() == settings
    lines = [line for line in to_yaml(settings).splitlines(keepends=True) if not line.startswith("  choice:")]
    folder.config.write_text("".join(lines))
    assert folder.settings().evaluation.choice == "first"
    assert resumed_settings(folder, ["trainer.steps=999"]).evaluation.choice == "first"
