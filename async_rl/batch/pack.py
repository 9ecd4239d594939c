"""Trajectories of one step as flat tensors, in micro-batches of whole trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from async_rl.batch.share import Share, Spread, plan, share_of
from async_rl.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Trajectories that go through the model in one packed forward: consecutive ones of the batch, or, over
    ranks, of the rank's share (slices then count in the share)."""

    tokens: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, from 0 in every trajectory
    lengths: tuple[int, ...]
    """tokens of each trajectory"""
    predictors: Tensor  # [policy tokens] int64
    """index of the token whose hidden state predicts the policy token (the one before it)"""
    targets: Tensor  # [policy tokens] int64
    trajectories: slice
    """which trajectories of the batch"""
    policy: slice
    """which policy tokens of the batch's columns"""
    policy_lengths: tuple[int, ...]
    """policy tokens of each trajectory"""
    idle: bool = False
    """a stand-in of two tokens and one prediction that counts for nothing, where this rank has fewer
    micro-batches than others: a sharded model's forward needs every rank"""

    def rows(self, column: Tensor) -> Tensor:  # [predictions]
        """The rows of a column of the share's policy tokens; 0 for a stand-in."""
        return column.new_zeros(1) if self.idle else column[self.policy]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One step's trajectories, group by group, and the columns an objective needs (policy tokens only).

    Columns are those of the whole batch on every rank, micro-batches those of this rank's share."""

    micro_batches: tuple[MicroBatch, ...]
    log_behaviour: Tensor  # [policy tokens] float32
    version: Tensor  # [policy tokens] int64
    turn_of_token: Tensor  # [policy tokens] int64
    trajectory_of_turn: Tensor  # [turns] int64
    group_of_trajectory: Tensor  # [trajectories] int64
    turn_reward: Tensor  # [turns] float32
    state_key: Tensor  # [turns] int64
    reward: Tensor  # [trajectories] float32
    truncated: Tensor  # [trajectories] bool
    num_tokens: int
    """all tokens, prompts and environment included"""
    share: Share | None = None
    """None: micro-batches hold the whole batch"""

    def own(self, column: Tensor) -> Tensor:  # [own policy tokens]
        """The rows of a column of policy tokens that this rank runs."""
        return column if self.share is None else column[self.share.policy]

    @property
    def num_trajectories(self) -> int:
        return len(self.reward)

    @property
    def num_policy_tokens(self) -> int:
        return len(self.log_behaviour)


def pack_batch(
    trajectories: Sequence[Trajectory],
    *,
    micro_batch_tokens: int,
    device: str | torch.device = "cpu",
    over: Spread | None = None,
) -> PackedBatch:
    """Pack trajectories (sorted here by group and sample) into micro-batches of at most
    `micro_batch_tokens` tokens; a longer trajectory gets one of its own. `over`: ranks that share them."""
    assert trajectories, "a batch has at least one trajectory"
    ordered = sorted(trajectories, key=lambda t: (t.group, t.sample))
    policy_positions = [t.policy_positions() for t in ordered]
    for trajectory, where in zip(ordered, policy_positions, strict=True):
        assert len(where) == 0 or where[0] > 0, f"group {trajectory.group}: a policy token without a prompt"
    turns = [(i, turn) for i, trajectory in enumerate(ordered) for turn in trajectory.turns]
    turn_lengths = np.array([turn.length for _, turn in turns], np.int64)
    groups = np.unique([t.group for t in ordered], return_inverse=True)[1]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(dtype=dtype, device=device)

    share = None
    if over is None:
        parts = [list(range(first, last)) for first, last in pairwise(_cuts(ordered, micro_batch_tokens))]
    else:
        made = plan(ordered, over, micro_batch_tokens)
        share, parts = share_of(made, ordered, over, device), made[over.rank]
    return PackedBatch(
        share=share,
        micro_batches=tuple(_micro_batches(ordered, policy_positions, parts, device)),
        log_behaviour=tensor(
            np.concatenate([t.log_behaviour[w] for t, w in zip(ordered, policy_positions, strict=True)]), torch.float32
        ),
        version=tensor(np.concatenate([t.policy_versions() for t in ordered]), torch.int64),
        turn_of_token=tensor(np.repeat(np.arange(len(turns)), turn_lengths), torch.int64),
        trajectory_of_turn=tensor([i for i, _ in turns], torch.int64),
        group_of_trajectory=tensor(groups, torch.int64),
        turn_reward=tensor([turn.reward for _, turn in turns], torch.float32),
        state_key=tensor([turn.state_key for _, turn in turns], torch.int64),
        reward=tensor([t.reward for t in ordered], torch.float32),
        truncated=tensor([t.ended in ("length", "turn_limit") for t in ordered], torch.bool),
        num_tokens=sum(len(t.tokens) for t in ordered),
    )


def _micro_batches(
    ordered: Sequence[Trajectory],
    policy_positions: Sequence[np.ndarray],
    parts: Sequence[Sequence[int]],
    device: str | torch.device,
) -> list[MicroBatch]:
    """A micro-batch for each part, laid end to end in this order."""
    out = []
    first = policy_start = 0
    for part in parts:
        if not part:
            out.append(_idle(first, policy_start, device))
            continue
        where = [policy_positions[i] for i in part]
        lengths = [len(ordered[i].tokens) for i in part]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        tokens = np.concatenate([ordered[i].tokens for i in part]).astype(np.int64)
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
        sampled = np.concatenate([w + s for w, s in zip(where, starts, strict=True)])
        out.append(
            MicroBatch(
                tokens=torch.from_numpy(tokens).to(device),
                positions=torch.from_numpy(positions).to(device),
                lengths=tuple(lengths),
                predictors=torch.from_numpy(sampled - 1).to(device),
                targets=torch.from_numpy(tokens[sampled]).to(device),
                trajectories=slice(first, first + len(part)),
                policy=slice(policy_start, policy_start + len(sampled)),
                policy_lengths=tuple(len(w) for w in where),
            )
        )
        first += len(part)
        policy_start += len(sampled)
    return out


def _idle(first: int, policy_start: int, device: str | torch.device) -> MicroBatch:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return MicroBatch(
        tokens=torch.zeros(2, dtype=torch.int64, device=device),
        positions=torch.arange(2, device=device),
        lengths=(2,),
        predictors=zero,
        targets=zero,
        trajectories=slice(first, first),
        policy=slice(policy_start, policy_start),
        policy_lengths=(1,),
        idle=True,
    )


def _cuts(ordered: Sequence[Trajectory], limit: int) -> list[int]:
    """Where micro-batches begin, and the end. A group that fits one micro-batch is not cut: an exact
    baseline then needs no second gradient sum for it."""
    sizes: dict[int, int] = {}
    for trajectory in ordered:
        sizes[trajectory.group] = sizes.get(trajectory.group, 0) + len(trajectory.tokens)
    cuts = [0]
    filled = 0
    for i, trajectory in enumerate(ordered):
        begins = i == 0 or ordered[i - 1].group != trajectory.group
        whole = sizes[trajectory.group] if begins else 0
        need = whole if whole <= limit else len(trajectory.tokens)
        if filled and filled + max(need, len(trajectory.tokens)) > limit:
            cuts.append(i)
            filled = 0
        filled += len(trajectory.tokens)
    return [*cuts, len(ordered)]
