"""Packing: nothing lost, nothing padded, policy tokens only, the same for any cut."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan


@st.composite
def episodes(draw: st.DrawFn) -> list[Trajectory]:
    """Ragged episodes: several turns, empty turns, several contexts, episodes without any policy token."""
    made = []
    for group in range(draw(st.integers(1, 4))):
        for sample in range(draw(st.integers(1, 3))):
            turns, position, contexts = [], draw(st.integers(1, 4)), []
            for _ in range(draw(st.integers(0, 3))):
                length = draw(st.integers(0, 4))
                turns.append(Turn(start=position, length=length, reward=draw(st.sampled_from([0.0, 0.5]))))
                position += length
                gap = draw(st.integers(0, 2))
                if gap and draw(st.booleans()):
                    contexts.append(position)
                position += gap
            version = draw(st.integers(0, 5))
            made.append(
                Trajectory(
                    group=group * 10,
                    sample=sample,
                    problem=0,
                    split="train",
                    seed=0,
                    tokens=np.array([draw(st.integers(0, 50)) for _ in range(position)], np.int32),
                    log_behaviour=np.linspace(-3, -0.5, position, dtype=np.float32),
                    turns=tuple(turns),
                    versions=(VersionSpan(version=version, start=0, end=position),),
                    reward=draw(st.floats(-1, 1, width=32)),
                    contexts=tuple(contexts),
                    ended=draw(st.sampled_from(["finished", "length", "turn_limit"])),
                )
            )
    return draw(st.permutations(made))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=episodes(), limit=st.integers(1, 40))
def test_every_policy_token_is_there_once_in_order_of_group_and_sample(batch: list[Trajectory], limit: int) -> None:
    packed = pack_batch(batch, micro_batch_tokens=limit)
    ordered = sorted(batch, key=lambda t: (t.group, t.sample))
    where = [t.policy_positions() for t in ordered]

    targets = torch.cat([m.targets for m in packed.micro_batches]).tolist()
    assert targets == [int(t.tokens[p]) for t, w in zip(ordered, where, strict=True) for p in w]
    before = [int(m.tokens[i]) for m in packed.micro_batches for i in m.predictors.tolist()]
    assert before == [int(t.tokens[p - 1]) for t, w in zip(ordered, where, strict=True) for p in w]
    assert packed.log_behaviour.tolist() == [
        float(t.log_behaviour[p]) for t, w in zip(ordered, where, strict=True) for p in w
    ]
    assert packed.version.tolist() == [v for t in ordered for v in t.policy_versions().tolist()]
    owner = packed.trajectory_of_turn[packed.turn_of_token].tolist()
    assert owner == [i for i, w in enumerate(where) for _ in w]
    assert packed.turn_reward.tolist() == [turn.reward for t in ordered for turn in t.turns]
    assert packed.reward.tolist() == [t.reward for t in ordered]
    assert packed.truncated.tolist() == [t.ended != "finished" for t in ordered]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=episodes(), limit=st.integers(1, 40))
def test_micro_batches_are_whole_trajectories_within_the_budget(batch: list[Trajectory], limit: int) -> None:
    packed = pack_batch(batch, micro_batch_tokens=limit)
    assert sum(len(m.tokens) for m in packed.micro_batches) == packed.num_tokens == sum(len(t.tokens) for t in batch)
    tokens_before = trajectories_before = 0
    for micro in packed.micro_batches:
        assert len(micro.tokens) == sum(micro.lengths) == sum(micro.documents)
        assert len(micro.tokens) <= limit or len(micro.lengths) == 1
        assert micro.policy.start == tokens_before
        assert micro.trajectories.start == trajectories_before
        tokens_before, trajectories_before = micro.policy.stop, micro.trajectories.stop
        assert sum(micro.policy_lengths) == micro.policy.stop - micro.policy.start
        assert micro.positions.tolist() == [i for n in micro.documents for i in range(n)]
        ordered = sorted(batch, key=lambda t: (t.group, t.sample))[micro.trajectories]
        assert micro.documents == tuple(n for t in ordered for n in t.context_lengths())
        assert micro.lengths == tuple(len(t.tokens) for t in ordered)
    assert trajectories_before == len(batch)
    assert packed.num_contexts == sum(1 + len(t.contexts) for t in batch)


def test_groups_are_numbered_from_zero_without_gaps() -> None:
    turn = (Turn(start=1, length=1),)
    made = [
        Trajectory(
            group=group,
            sample=0,
            problem=0,
            split="train",
            seed=0,
            tokens=np.array([1, 2], np.int32),
            log_behaviour=np.zeros(2, np.float32),
            turns=turn,
            versions=(VersionSpan(version=0, start=1, end=2),),
            reward=0.0,
            ended="finished",
        )
        for group in (90, 7, 7, 1000)
    ]
    assert pack_batch(made, micro_batch_tokens=100).group_of_trajectory.tolist() == [0, 0, 1, 2]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batch=episodes(), limit=st.integers(1, 60))
def test_a_group_that_fits_one_micro_batch_is_not_cut(batch: list[Trajectory], limit: int) -> None:
    packed = pack_batch(batch, micro_batch_tokens=limit)
    groups = sorted({t.group for t in batch})
    for number, group in enumerate(groups):
        where = (packed.group_of_trajectory == number).nonzero().flatten().tolist()
        parts = {
            i
            for i, m in enumerate(packed.micro_batches)
            for t in where
            if m.trajectories.start <= t < m.trajectories.stop
        }
        if sum(len(t.tokens) for t in batch if t.group == group) <= limit:
            assert len(parts) == 1
