"""Batches over ranks: everything once, groups whole where they must be, near the best there is."""

from __future__ import annotations

from itertools import chain, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from async_rl.model.architecture import DecoderConfig, tensor_shapes
from async_rl.trainer.build import decoder_cost
from async_rl.trainer.packing import pack_batch
from async_rl.trainer.shares import (
    Cost,
    Spread,
    differencing,
    fill,
    largest,
    plan,
    reaches,
    spread,
    to_the_lightest,
)
from async_rl.trajectory import Trajectory, Turn, VersionSpan

COST = Cost(per_token=100, per_policy_token=30, per_pair=3)
COSTS = st.lists(st.integers(0, 1000), max_size=40)
BINS = st.integers(1, 6)


@st.composite
def batches(draw: st.DrawFn) -> list[Trajectory]:
    """Groups of ragged sizes; some trajectories without policy tokens."""
    made = []
    for group, size in enumerate(draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))):
        for sample in range(size):
            prompt, sampled = draw(st.integers(1, 20)), draw(st.integers(0, 30))
            first = draw(st.integers(1, 20))  # a context before the one that is sampled in
            made.append(
                Trajectory(
                    group=10 * group, sample=sample, problem=0, split="train", seed=0,
                    tokens=np.arange(prompt + sampled, dtype=np.int32),
                    log_behaviour=np.zeros(prompt + sampled, np.float32),
                    contexts=(first,) if first < prompt else (),
                    turns=(Turn(start=prompt, length=sampled),) if sampled else (),
                    versions=(VersionSpan(version=0, start=0, end=prompt + sampled),), reward=1.0, ended="finished",
                )
            )  # fmt: skip
    return made


def trajectory(group: int, sample: int, tokens: int) -> Trajectory:
    return Trajectory(
        group=group, sample=sample, problem=0, split="train", seed=0, tokens=np.zeros(tokens, np.int32),
        log_behaviour=np.zeros(tokens, np.float32), turns=(Turn(start=1, length=tokens - 1),),
        versions=(VersionSpan(version=0, start=1, end=tokens),), reward=1.0, ended="finished",
    )  # fmt: skip


@given(COSTS, BINS)
def test_each_index_is_in_one_bin(costs: list[int], bins: int) -> None:
    for found in (spread(costs, bins), differencing(costs, bins), to_the_lightest(costs, range(len(costs)), bins)):
        assert len(found) == bins
        assert sorted(chain.from_iterable(found)) == list(range(len(costs)))


@given(COSTS, BINS)
def test_a_spread_is_never_worse_than_one_in_order_or_longest_first(costs: list[int], bins: int) -> None:
    longest_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    for order in (range(len(costs)), longest_first):
        assert largest(spread(costs, bins), costs) <= largest(to_the_lightest(costs, order, bins), costs)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=7), st.integers(1, 4))
def test_a_spread_is_within_the_longest_firsts_bound_of_the_best(costs: list[int], bins: int) -> None:
    best = min(
        max(sum(c for c, b in zip(costs, chosen, strict=True) if b == one) for one in range(bins))
        for chosen in product(range(bins), repeat=len(costs))
    )
    # Graham 1969: 4/3 - 1/(3 bins)
    assert 3 * bins * largest(spread(costs, bins), costs) <= (4 * bins - 1) * best


def test_differencing_finds_what_the_longest_first_does_not() -> None:
    costs = [8, 7, 6, 5, 4]
    assert largest(to_the_lightest(costs, range(5), 2), costs) == 17
    assert largest(spread(costs, 2), costs) == 16


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 20)), max_size=20), BINS, st.integers(1, 60))
def test_what_is_filled_fits_and_begins_with_the_heaviest(pairs: list[tuple[int, int]], bins: int, limit: int) -> None:
    costs, sizes = [c for c, _ in pairs], [s for _, s in pairs]
    found = fill(costs, sizes, bins, limit)
    if found is None:
        return
    assert sorted(chain.from_iterable(found)) == list(range(len(pairs)))
    assert all(sum(sizes[i] for i in one) <= limit or len(one) == 1 for one in found)
    sums = [sum(costs[i] for i in one) for one in found]
    assert sums == sorted(sums, reverse=True)


@settings(max_examples=60)
@given(batches(), st.integers(2, 5), st.integers(5, 200), st.booleans())
def test_ranks_have_every_trajectory_once_and_groups_whole(
    batch: list[Trajectory], size: int, limit: int, whole: bool
) -> None:
    over = Spread(rank=0, size=size, cost=COST, whole_groups=whole)
    made = plan(batch, over, limit)
    assert len({len(micro_batches) for micro_batches in made}) == 1, "ranks run as many forwards"
    flat = [i for micro_batches in made for one in micro_batches for i in one]
    assert sorted(flat) == [i for i, t in enumerate(batch) if t.num_policy_tokens]
    for one in chain.from_iterable(made):
        assert sum(len(batch[i].tokens) for i in one) <= limit or len(one) == 1
    if not whole:
        return
    places: dict[int, set[tuple[int, int]]] = {}
    for rank, micro_batches in enumerate(made):
        for number, one in enumerate(micro_batches):
            for i in one:
                places.setdefault(batch[i].group, set()).add((number, rank))
    tokens = {g: [len(t.tokens) for t in batch if t.group == g and t.num_policy_tokens] for g in places}
    if all(sum(of) <= limit or len(of) == 1 for of in tokens.values()):
        assert all(len(held) == 1 for held in places.values()), "groups that fit a micro-batch are in one"
    for group, held in places.items():
        fits = fill([1] * len(tokens[group]), tokens[group], size, limit) is not None
        assert not fits or len({number for number, _ in held}) == 1, "a group that fits a round is in one"


def test_a_group_longer_than_a_micro_batch_is_run_by_all_ranks_at_once() -> None:
    batch = [trajectory(group, sample, 10) for group in range(6) for sample in range(4)]
    for size, limit, wanted in (
        (2, 40, ["micro_batch"] * 3), (2, 20, ["round"] * 6), (2, 30, ["round"] * 6), (4, 20, ["round"] * 3),
        (2, 10, ["rounds"] * 12), (3, 10, ["rounds"] * 8), (4, 10, ["round"] * 6),
    ):  # fmt: skip
        over = Spread(rank=0, size=size, cost=COST, whole_groups=True)
        made = plan(batch, over, limit)
        assert list(reaches(made, [t.group for t in batch])) == wanted, (size, limit)
        work = [sum(len(one) for one in micro_batches) for micro_batches in made]
        assert max(work) - min(work) <= 1 + (size == 3), "the ranks have as much to do"


def test_what_fits_a_round_does_not_wait_for_what_does_not() -> None:
    batch = [trajectory(0, sample, 10) for sample in range(5)] + [trajectory(1, sample, 10) for sample in range(4)]
    made = plan(batch, Spread(rank=0, size=2, cost=COST, whole_groups=True), 20)
    assert reaches(made, [t.group for t in batch]) == ("round", "rounds", "rounds")


@settings(max_examples=40)
@given(batches(), st.integers(2, 4), st.integers(20, 200), st.booleans())
def test_shares_join_to_the_columns_of_the_batch(batch: list[Trajectory], size: int, limit: int, whole: bool) -> None:
    alone = pack_batch(batch, micro_batch_tokens=limit)
    rows: list[torch.Tensor] = []
    lengths: list[tuple[int, ...]] = []
    trajectories: list[torch.Tensor] = []
    for rank in range(size):
        over = Spread(rank=rank, size=size, cost=COST, whole_groups=whole)
        packed = pack_batch(batch, micro_batch_tokens=limit, over=over)
        share = packed.share
        assert share is not None
        assert torch.equal(packed.log_behaviour, alone.log_behaviour)
        assert torch.equal(packed.group_of_trajectory, alone.group_of_trajectory)
        used = [m for m in packed.micro_batches if not m.idle]
        rows.append(torch.cat([torch.zeros(0, dtype=torch.int64), *[m.targets for m in used]]))
        trajectories.append(share.trajectories)
        lengths.append(share.policy_of_rank)
        position = torch.arange(packed.num_policy_tokens)
        assert torch.equal(packed.own(position), share.policy)
        for micro in packed.micro_batches:
            assert len(micro.rows(packed.own(position))) == len(micro.predictors)
    assert len(set(lengths)) == 1
    assert lengths[0] == tuple(map(len, rows))
    joined = torch.empty(alone.num_policy_tokens, dtype=torch.int64)
    joined[share.every_policy] = torch.cat(rows)
    assert joined.tolist() == [int(t) for m in alone.micro_batches for t in m.targets]
    assert torch.equal(torch.cat(trajectories), share.every_trajectory)
    cut = [group for group in {t.group for t in batch} if _in_micro_batches(batch, group, size, limit, whole) > 1]
    assert share.groups_cut == bool(cut)


def _in_micro_batches(batch: list[Trajectory], group: int, size: int, limit: int, whole: bool) -> int:
    made = plan(batch, Spread(rank=0, size=size, cost=COST, whole_groups=whole), limit)
    return sum(any(batch[i].group == group for i in one) for one in chain.from_iterable(made))


@pytest.mark.parametrize(("tokens", "sampled"), [(1, 0), (7, 3), (100, 90)])
def test_a_cost_counts_the_products_of_a_forward(tokens: int, sampled: int) -> None:
    config = DecoderConfig(
        family="llama", vocabulary=50, hidden=16, intermediate=40, layers=3, heads=4, kv_heads=2, head_dim=6,
        max_context=128,
    )  # fmt: skip
    found = decoder_cost(config)
    shapes = [s for name, s in tensor_shapes(config).items() if len(s) == 2 and "layers" in name]
    counter = FlopCounterMode(display=False)
    with counter:
        for rows, columns in shapes:
            torch.ones(tokens, columns) @ torch.ones(columns, rows)
        torch.ones(sampled, config.hidden) @ torch.ones(config.hidden, config.vocabulary)
    assert found.per_token * tokens + found.per_policy_token * sampled == counter.get_total_flops()
    # of every pair, twice a product over head_dim in every head, for scores and values
    assert found.per_pair == 2 * 2 * config.layers * config.heads * config.head_dim
    assert found.of(tokens, sampled) == counter.get_total_flops() + found.per_pair * tokens * (tokens + 1) // 2
