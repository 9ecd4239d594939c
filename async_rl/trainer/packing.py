"""Trajectories of one step as flat tensors, in micro-batches of whole trajectories, and how ranks share them.

Shapes: T policy tokens, U turns, I trajectories of the whole batch, sorted by group and sample; columns of the batch
are the same on every rank, micro-batches are those of this rank's share. N tokens of a micro-batch, prompts and
environment included. The division of work (`plan`) is pure: every rank finds the same.

A trajectory is one row of every column, however many contexts it has. For the model each context is a document:
positions from 0, and no attention to the others. So a trajectory that is longer than a micro-batch may be cut between
contexts, except where the gradient of each trajectory is looked at by itself (`TrajectoryGradient`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from async_rl.config import Settings
from async_rl.errors import RunFailed
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.trajectory import Trajectory, Turn

Bins = list[list[int]]
"""indices, each once; every bin in rising order"""
Plan = list[list[list[int]]]
"""for each rank, for each of its micro-batches, the trajectories: as many micro-batches on every rank, some empty"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Trajectories that go through the model in one packed forward.

    They are consecutive in the batch or, over ranks, in the rank's share (then slices count in the share). t policy
    tokens, N tokens.
    """

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64, from 0 in every document
    lengths: tuple[int, ...]
    """tokens of each trajectory"""
    documents: tuple[int, ...]
    """tokens of each document: the trajectories' contexts, which do not see each other"""
    predictors: Tensor  # [t] int64
    """index of the token whose hidden state predicts the policy token (the one before it)"""
    targets: Tensor  # [t] int64, the policy tokens
    trajectories: slice
    """which trajectories of the batch (where long ones are cut: which pieces of them)"""
    policy: slice
    """which policy tokens of the batch's columns"""
    policy_lengths: tuple[int, ...]
    """policy tokens of each trajectory"""
    stretch: Tensor | None = None  # [t] float64
    """factor on the hidden state that predicts each token, which turns logits at the trajectory's temperature into
    those at its turn's: the first temperature / the second; None: no turn has its own"""
    idle: bool = False
    """a stand-in of two tokens and one prediction that counts for nothing, where this rank has fewer
    micro-batches than others: a sharded model's forward needs every rank"""

    def rows(self, column: Tensor) -> Tensor:
        """Its rows of a column of the share's policy tokens, [own T] -> [t]; [1] of 0 for a stand-in."""
        return column.new_zeros(1) if self.idle else column[self.policy]

    def stretched(self, hidden: Tensor) -> Tensor:
        """Hidden states that predict the policy tokens, [t, H], as the head is to see them.

        Logits are linear in them, so this is exact for log-probs and gradients.
        """
        return hidden if self.stretch is None else hidden * self.stretch[:, None].to(hidden.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One step's trajectories, group by group, and the columns that an objective needs (policy tokens only).

    Columns are those of the whole batch on every rank, micro-batches those of this rank's share.
    """

    micro_batches: tuple[MicroBatch, ...]
    log_behaviour: Tensor  # [T] float32
    version: Tensor  # [T] int64
    turn_of_token: Tensor  # [T] int64
    trajectory_of_turn: Tensor  # [U] int64
    group_of_trajectory: Tensor  # [I] int64
    turn_reward: Tensor  # [U] float32
    state_key: Tensor  # [U] int64
    agent_of_turn: Tensor  # [U] int64, into `agents`
    reward: Tensor  # [I] float32
    truncated: Tensor  # [I] bool
    num_tokens: int
    """all tokens, prompts and environment included"""
    num_contexts: int
    """of all trajectories; each has one at least"""
    agents: tuple[str, ...] = ("",)
    """names of those who speak; the empty one speaks where a task names none"""
    share: Share | None = None
    """None: micro-batches hold the whole batch"""

    def own(self, column: Tensor) -> Tensor:
        """The rows of a column that this rank runs: [T, ...] -> [own policy tokens, ...]."""
        return column if self.share is None else column[self.share.policy]

    @property
    def num_trajectories(self) -> int:
        return len(self.reward)

    @property
    def several_contexts(self) -> bool:
        """Whether some trajectory has more than one."""
        return self.num_contexts > self.num_trajectories

    @property
    def num_policy_tokens(self) -> int:
        return len(self.log_behaviour)


def pack_step(
    settings: Settings, trajectories: Sequence[Trajectory], over: Spread | None = None, *, whole: bool | None = None
) -> PackedBatch:
    """The batch of a step as it is trained: failed trajectories are left out. `whole`: no trajectory is cut between
    contexts; None: as the settings' recipe needs it.

    Every rank gives all trajectories, and gets the columns of all and micro-batches of its own share (`over`: the
    learner's). Raises RunFailed when no trajectory is usable.
    """
    usable = [t for t in trajectories if not t.failed]
    if not usable:
        raise RunFailed("the batch holds no usable trajectory")
    limit = settings.trainer.micro_batch_tokens
    if whole is None:
        several = any(t.contexts for t in usable)
        whole = not several or requirements(load_recipe(settings.recipe)).per_trajectory_norms
    return pack_batch(usable, micro_batch_tokens=limit, device=settings.trainer.device, over=over, whole=whole)


def pack_batch(
    trajectories: Sequence[Trajectory],
    *,
    micro_batch_tokens: int,
    device: str | torch.device = "cpu",
    over: Spread | None = None,
    whole: bool = True,
) -> PackedBatch:
    """Sort trajectories by group and sample, and pack them into micro-batches of at most `micro_batch_tokens` tokens.

    A longer trajectory gets a micro-batch of its own, or without `whole` one for as many of its contexts as fit.
    `over`: ranks that share the batch.
    """
    assert trajectories, "a batch has at least one trajectory"
    ordered = sorted(trajectories, key=lambda t: (t.group, t.sample))
    policy_positions = [t.policy_positions() for t in ordered]
    for trajectory, where in zip(ordered, policy_positions, strict=True):
        assert all((where != begin).all() for begin in (0, *trajectory.contexts)), (
            f"group {trajectory.group}: a policy token without a prompt"
        )
    turns = [(i, turn) for i, trajectory in enumerate(ordered) for turn in trajectory.turns]
    turn_lengths = np.array([turn.length for _, turn in turns], np.int64)
    groups = np.unique([t.group for t in ordered], return_inverse=True)[1]
    agents = {name: i for i, name in enumerate(sorted({turn.agent for _, turn in turns} or {""}))}

    def tensor(values: object, dtype: torch.dtype) -> Tensor:  # [n]
        return torch.as_tensor(np.asarray(values)).to(dtype=dtype, device=device)

    share = None
    pieces, policy_of_piece = ordered, policy_positions
    if not whole:
        pieces = list(chain.from_iterable(_pieces(t, micro_batch_tokens) for t in ordered))
        policy_of_piece = [t.policy_positions() for t in pieces]
    if over is None:
        parts = [list(range(first, last)) for first, last in pairwise(_cuts(pieces, micro_batch_tokens))]
    else:
        made = plan(pieces, over, micro_batch_tokens)
        share, parts = share_of(made, pieces, over, device), made[over.rank]
    return PackedBatch(
        share=share,
        micro_batches=tuple(_pack_parts(pieces, policy_of_piece, parts, device)),
        log_behaviour=tensor(
            np.concatenate([t.log_behaviour[w] for t, w in zip(ordered, policy_positions, strict=True)]), torch.float32
        ),
        version=tensor(np.concatenate([t.policy_versions() for t in ordered]), torch.int64),
        turn_of_token=tensor(np.repeat(np.arange(len(turns)), turn_lengths), torch.int64),
        trajectory_of_turn=tensor([i for i, _ in turns], torch.int64),
        group_of_trajectory=tensor(groups, torch.int64),
        turn_reward=tensor([turn.reward for _, turn in turns], torch.float32),
        state_key=tensor([turn.state_key for _, turn in turns], torch.int64),
        agent_of_turn=tensor([agents[turn.agent] for _, turn in turns], torch.int64),
        agents=tuple(agents),
        reward=tensor([t.reward for t in ordered], torch.float32),
        truncated=tensor([t.ended in ("length", "turn_limit") for t in ordered], torch.bool),
        num_tokens=sum(len(t.tokens) for t in ordered),
        num_contexts=sum(1 + len(t.contexts) for t in ordered),
    )


def _pieces(trajectory: Trajectory, limit: int) -> list[Trajectory]:
    """A trajectory of more than `limit` tokens as pieces of at most so many, cut between contexts; a longer context is
    a piece of its own. Tokens, turns and contexts are those of the piece, all else is that of the trajectory."""
    if len(trajectory.tokens) <= limit or not trajectory.contexts:
        return [trajectory]
    cuts = [0]
    for begin, end in pairwise([0, *trajectory.contexts, len(trajectory.tokens)]):
        if end - cuts[-1] > limit and begin > cuts[-1]:
            cuts.append(begin)
    return [
        replace(
            trajectory,
            tokens=trajectory.tokens[begin:end],
            turns=tuple(replace(t, start=t.start - begin) for t in trajectory.turns if _within(t, begin, end)),
            contexts=tuple(start - begin for start in trajectory.contexts if begin < start < end),
        )
        for begin, end in pairwise([*cuts, len(trajectory.tokens)])
    ]


def _within(turn: Turn, begin: int, end: int) -> bool:
    return turn.length > 0 and begin <= turn.start < end


def _pack_parts(
    ordered: Sequence[Trajectory],
    policy_positions: Sequence[np.ndarray],
    parts: Sequence[Sequence[int]],
    device: str | torch.device,
) -> list[MicroBatch]:
    """A micro-batch for each part (indices of trajectories), one behind the other in this order.

    policy_positions: of each trajectory, where its policy tokens stand in it, [its policy tokens].
    """
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
        documents = list(chain.from_iterable(ordered[i].context_lengths() for i in part))
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in documents])
        sampled = np.concatenate([w + s for w, s in zip(where, starts, strict=True)])
        out.append(
            MicroBatch(
                tokens=torch.from_numpy(tokens).to(device),
                positions=torch.from_numpy(positions).to(device),
                lengths=tuple(lengths),
                documents=tuple(documents),
                predictors=torch.from_numpy(sampled - 1).to(device),
                targets=torch.from_numpy(tokens[sampled]).to(device),
                trajectories=slice(first, first + len(part)),
                policy=slice(policy_start, policy_start + len(sampled)),
                policy_lengths=tuple(len(w) for w in where),
                stretch=_stretch([ordered[i] for i in part], device),
            )
        )
        first += len(part)
        policy_start += len(sampled)
    return out


def _stretch(trajectories: Sequence[Trajectory], device: str | torch.device) -> Tensor | None:
    """`MicroBatch.stretch` of these trajectories, [their policy tokens]."""
    if not any(turn.temperature for t in trajectories for turn in t.turns):
        return None
    factors = [
        np.full(turn.length, (t.temperature or 1.0) / t.log_prob_temperature(turn))
        for t in trajectories
        for turn in t.turns
    ]
    return torch.from_numpy(np.concatenate(factors)).to(device)


def _idle(first: int, policy_start: int, device: str | torch.device) -> MicroBatch:
    """A stand-in for a rank that has fewer micro-batches than others."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return MicroBatch(
        tokens=torch.zeros(2, dtype=torch.int64, device=device),
        positions=torch.arange(2, device=device),
        lengths=(2,),
        documents=(2,),
        predictors=zero,
        targets=zero,
        trajectories=slice(first, first),
        policy=slice(policy_start, policy_start),
        policy_lengths=(1,),
        idle=True,
    )


def _cuts(ordered: Sequence[Trajectory], limit: int) -> list[int]:
    """Where micro-batches begin, and the end.

    A group that fits one micro-batch is not cut: an exact baseline then needs no second gradient sum for it.
    """
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


# How ranks share a batch.


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a batch is laid over ranks."""

    rank: int
    size: int
    cost: Cost
    whole_groups: bool
    """whether the trajectories of a group stay on one rank: their gradients are compared there"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """Which rows of a batch's columns this rank computes, and where the rows of all ranks belong.

    `every_*` map rows of all ranks, one rank behind the other, to rows of the batch. Trajectories without policy tokens
    are run by no rank.
    """

    trajectories: Tensor  # [own trajectories] int64
    policy: Tensor  # [own policy tokens] int64
    trajectories_of_rank: tuple[int, ...]
    """trajectories of each rank"""
    policy_of_rank: tuple[int, ...]
    """policy tokens of each rank"""
    every_trajectory: Tensor  # [trajectories of all ranks] int64
    every_policy: Tensor  # [policy tokens] int64
    groups_cut: bool
    """some group, on some rank, is spread over several micro-batches or ranks"""
    imbalance: float
    """cost of the busiest rank as a multiple of the mean"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Multiplications and additions of a model's forward over one trajectory (the backward takes twice as many).

    A term linear in the tokens for the matrices, and a quadratic one for attention.
    """

    per_token: int
    """2 x elements of the layers' matrices"""
    per_policy_token: int
    """2 x elements of the head, which is used where a token is predicted only"""
    per_pair: int
    """of a token and one that it sees: 2 x layers x heads x head_dim for the score, as many for the value"""

    def of(self, tokens: int, policy_tokens: int) -> int:
        """The cost of a trajectory of one context; each token sees itself and those before it."""
        pairs = tokens * (tokens + 1) // 2
        return self.per_token * tokens + self.per_policy_token * policy_tokens + self.per_pair * pairs

    def of_trajectory(self, trajectory: Trajectory) -> int:
        """The cost of a trajectory; contexts do not see each other."""
        contexts = sum(self.of(tokens, 0) for tokens in trajectory.context_lengths())
        return contexts + self.of(0, trajectory.num_policy_tokens)


def plan(ordered: Sequence[Trajectory], over: Spread, limit: int) -> Plan:
    """Every trajectory that has policy tokens once, in micro-batches of at most `limit` tokens.

    A longer trajectory has a micro-batch of its own. Where groups stay whole, a group that fits one is not cut.
    """
    sizes = [len(t.tokens) for t in ordered]
    costs = [over.cost.of_trajectory(t) for t in ordered]
    used = [i for i, t in enumerate(ordered) if t.num_policy_tokens]
    units = _groups(ordered, used) if over.whole_groups else [[i] for i in used]
    of_rank = spread([sum(costs[i] for i in unit) for unit in units], over.size)
    pieces = [_fitting([units[u] for u in chosen], sizes, limit) for chosen in of_rank]
    number = max(1, max(-(-sum(sizes[i] for piece in own for i in piece) // limit) for own in pieces))
    while True:
        filled = [
            fill([sum(costs[i] for i in p) for p in own], [sum(sizes[i] for i in p) for p in own], number, limit)
            for own in pieces
        ]
        made = [_micro_batches(f, own) for f, own in zip(filled, pieces, strict=True) if f is not None]
        if len(made) == over.size:
            return made
        number += 1  # ends: at the latest each piece has a micro-batch of its own


def share_of(made: Plan, ordered: Sequence[Trajectory], over: Spread, device: str | torch.device) -> Share:
    """What the plan means for the columns of this rank (`over.rank`)."""
    lengths = torch.tensor([t.num_policy_tokens for t in ordered])
    starts = lengths.cumsum(0) - lengths
    of_rank = [list(chain.from_iterable(micro_batches)) for micro_batches in made]
    rows = [
        torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in own])
        if own
        else torch.zeros(0, dtype=torch.int64)
        for own in of_rank
    ]
    work = [sum(over.cost.of_trajectory(ordered[i]) for i in own) for own in of_rank]
    return Share(
        trajectories=torch.tensor(of_rank[over.rank], dtype=torch.int64, device=device),
        policy=rows[over.rank].to(device),
        trajectories_of_rank=tuple(map(len, of_rank)),
        policy_of_rank=tuple(map(len, rows)),
        every_trajectory=torch.tensor(list(chain.from_iterable(of_rank)), dtype=torch.int64, device=device),
        every_policy=torch.cat(rows).to(device),
        groups_cut=_cuts_a_group(made, ordered),
        imbalance=max(work) * over.size / sum(work) if sum(work) else 1.0,
    )


def _groups(ordered: Sequence[Trajectory], used: Sequence[int]) -> list[list[int]]:
    """The indices `used`, group by group."""
    found: dict[int, list[int]] = {}
    for i in used:
        found.setdefault(ordered[i].group, []).append(i)
    return list(found.values())


def _fitting(units: Sequence[list[int]], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Units that fit a micro-batch as they are, the others trajectory by trajectory."""
    pieces: list[list[int]] = []
    for unit in units:
        pieces += [unit] if sum(sizes[i] for i in unit) <= limit else [[i] for i in unit]
    return pieces


def _micro_batches(filled: Sequence[Sequence[int]], pieces: Sequence[list[int]]) -> list[list[int]]:
    """Bins of pieces -> bins of trajectories."""
    return [sorted(chain.from_iterable(pieces[p] for p in one)) for one in filled]


def _cuts_a_group(made: Plan, ordered: Sequence[Trajectory]) -> bool:
    """Whether some group, on some rank, is spread over several micro-batches or ranks."""
    seen: set[int] = set()
    for micro_batch in chain.from_iterable(made):
        groups = {ordered[i].group for i in micro_batch}
        if groups & seen:
            return True
        seen |= groups
    return False


# Bins of nearly equal cost. The slowest rank sets the pace, so the largest sum is made small.


def spread(costs: Sequence[int], bins: int) -> Bins:
    """Indices of `costs` in `bins` bins (some may stay empty) with a small largest sum.

    The best of three: Karmarkar and Karp's differencing, the longest first, and each in order to the bin
    that has least. Costs are not negative.
    """
    longest_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    candidates = (
        differencing(costs, bins),
        to_the_lightest(costs, longest_first, bins),
        to_the_lightest(costs, range(len(costs)), bins),
    )
    return min(candidates, key=lambda found: largest(found, costs))


def largest(bins: Bins, costs: Sequence[int]) -> int:
    """The largest sum of costs in a bin."""
    return max(sum(costs[i] for i in one) for one in bins)


def to_the_lightest(costs: Sequence[int], order: Sequence[int], bins: int) -> Bins:
    """Put the indices, in this order, each into the bin that has the smallest sum then."""
    found: Bins = [[] for _ in range(bins)]
    sums = [(0, number) for number in range(bins)]
    for i in order:
        total, number = sums[0]
        found[number].append(i)
        heapq.heapreplace(sums, (total + costs[i], number))
    return [sorted(one) for one in found]


def differencing(costs: Sequence[int], bins: int) -> Bins:
    """Karmarkar and Karp (1982) for several bins: the two partial answers of the largest spread are joined,
    the heaviest bins of one with the lightest of the other, until one is left."""
    if not costs:
        return [[] for _ in range(bins)]
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for i, cost in enumerate(costs):
        part: list[tuple[int, list[int]]] = [(0, []) for _ in range(bins - 1)] + [(cost, [i])]
        heap.append((part[0][0] - cost, i, part))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, one = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        joined = [(a + b, [*left, *right]) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: part[0])
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], number, joined))
    return sorted(sorted(members) for _, members in heap[0][2])


def fill(costs: Sequence[int], sizes: Sequence[int], bins: int, limit: int) -> Bins | None:
    """Like `spread`, with at most `limit` of `sizes` in a bin (more where one alone is larger); heaviest bin first.

    None when they do not fit, put in by falling size.
    """
    found: Bins = [[] for _ in range(bins)]
    sums, filled = [0] * bins, [0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-sizes[i], -costs[i])):
        room = [n for n in range(bins) if not found[n] or filled[n] + sizes[i] <= limit]
        if not room:
            return None
        chosen = min(room, key=lambda n: sums[n])
        found[chosen].append(i)
        sums[chosen] += costs[i]
        filled[chosen] += sizes[i]
    heaviest_first = sorted(range(bins), key=lambda n: -sums[n])
    return [sorted(found[n]) for n in heaviest_first]
