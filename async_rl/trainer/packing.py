"""Trajectories of one step as flat tensors, in micro-batches of whole trajectories.

Shapes: T policy tokens, U turns, I trajectories of the whole batch, sorted by group and sample; columns of the batch
are the same on every rank, micro-batches are those of this rank's share (shares.py). N rows of a micro-batch: its
tokens, prompts and environment included, a shared prefix once.

A trajectory is one row of every column, however many contexts it has. For the model each context is a document:
positions from 0, and no attention to the others. So a trajectory that is longer than a micro-batch may be cut between
contexts, except where the gradient of each trajectory is looked at by itself (`TrajectoryGradient`).

Documents of a micro-batch that begin alike, as the samples of a prompt do, share the rows of that beginning: they form
a tree (model/prefix_tree.py), and the model computes, differentiates and stores each row once. A row may predict
several tokens then, one for each document that goes on from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from async_rl.config import Settings
from async_rl.config.teachers import NOTE, TeacherSettings, teachers_of
from async_rl.errors import RunFailed
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Attention
from async_rl.model.prefix_tree import PrefixTree, make_tree
from async_rl.model.tree_attention import TreeAttention
from async_rl.model.varlen import Kernel
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import Requirements, requirements
from async_rl.objective.tokens import Noted, Reused
from async_rl.trainer.noted import noted_columns, taught
from async_rl.trainer.pieces import Earlier, cut_among, earlier_of
from async_rl.trainer.plans import forks_among, greedy_among
from async_rl.trainer.pruning import pruned
from async_rl.trainer.reused import reused_columns
from async_rl.trainer.shares import Share, Sizes, Spread, cuts, plan, share_of
from async_rl.trajectory import Trajectory, Turn
from async_rl.trajectory.forks import FORK
from async_rl.trajectory.reuse import SOURCE
from async_rl.trajectory.types import GREEDY


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What one packed forward computes: N rows and t policy tokens, which p of them predict."""

    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64, from 0 in every document
    documents: tuple[int, ...]
    """tokens of each document: the trajectories' contexts, which do not see each other"""
    predicting: Tensor  # [p] int64
    """the rows whose hidden states predict policy tokens, each once"""
    place: Tensor | None  # [t] int64
    """index in `predicting` of the row that predicts each policy token; None: one after the other"""
    targets: Tensor  # [t] int64, the policy tokens
    stretch: Tensor | None = None  # [t] float64
    """factor on the hidden state that predicts each token, which turns logits at the trajectory's temperature into
    those at its turn's: the first temperature / the second; None: no turn has its own"""
    tree: PrefixTree | None = None
    """of the documents; None: they have no beginning in common, or share none"""

    def attention(self, kernel: Kernel | None = None) -> Attention:
        """Attention among the rows."""
        return DocumentAttention(self.documents, kernel) if self.tree is None else TreeAttention(self.tree, kernel)

    def of_policy(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows `predicting`, [p, H] -> those that predict the policy tokens, [t, H]."""
        return hidden if self.place is None else hidden.index_select(0, self.place)

    def stretched(self, hidden: Tensor) -> Tensor:
        """Hidden states that predict the policy tokens, [t, H], as the head is to see them.

        Logits are linear in them, so this is exact for log-probs and gradients.
        """
        return hidden if self.stretch is None else hidden * self.stretch[:, None].to(hidden.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch(Rows):
    """Trajectories that go through the model in one packed forward.

    They are consecutive in the batch or, over ranks, in the rank's share (then slices count in the share). Without a
    tree the N rows are those of all tokens.
    """

    lengths: tuple[int, ...]
    """tokens of each trajectory"""
    predictors: Tensor  # [t] int64
    """row whose hidden state predicts the policy token (that of the token before it)"""
    predictor_tokens: Tensor  # [t] int64
    """index of the token before the policy token among those of the trajectories, one behind the other; without a tree
    `predictors`"""
    sampled: Tensor  # [t] int64
    """row of the policy token itself"""
    trajectories: slice
    """which trajectories of the batch (where long ones are cut: which pieces of them)"""
    policy: slice
    """which policy tokens of the batch's columns"""
    policy_lengths: tuple[int, ...]
    """policy tokens of each trajectory"""
    counted: int
    """rows that count against `trainer.micro_batch_tokens`: N, or all tokens where each trajectory is differentiated
    by itself"""
    idle: bool = False
    """a stand-in of two tokens and one prediction that counts for nothing, where this rank has fewer
    micro-batches than others: a sharded model's forward needs every rank"""

    def rows(self, column: Tensor) -> Tensor:
        """Its rows of a column of the share's policy tokens, [own T] -> [t]; [1] of 0 for a stand-in."""
        return column.new_zeros(1) if self.idle else column[self.policy]

    def owners(self) -> Tensor:  # [t] int64
        """The trajectory of each policy token, counted from 0 in the micro-batch."""
        lengths = torch.tensor(self.policy_lengths)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.tokens.device)


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
    noted: Noted = field(default_factory=Noted)
    """what the tasks noted, of the names that the recipe asks for"""
    reused: Reused | None = None
    """what came back from the experience pool; None: nothing did"""
    cut: Tensor | None = None  # [I] bool
    """as `objective.Columns.cut`"""
    earlier: Earlier[PackedBatch] | None = None
    """tokens on which the critic alone is trained; None: there are none"""
    forks: Tensor | None = None  # [I, 2] int64
    """as `objective.Columns.forks`"""
    greedy: Tensor | None = None  # [I] bool
    """as `objective.Columns.greedy`"""
    taught: Mapping[str, Tensor] = field(default_factory=dict)  # [I] bool
    """which trajectories a teacher speaks of, for teachers that do not speak of all"""
    share: Share | None = None
    """None: micro-batches hold the whole batch"""
    part: Callable[[Collection[int]], PackedBatch] | None = None
    """packs these of its groups as a batch of their own, over the same ranks and within the same micro-batches"""

    def own(self, column: Tensor) -> Tensor:
        """The rows of a column that this rank runs: [T, ...] -> [own policy tokens, ...]."""
        return column if self.share is None else column[self.share.policy]

    @property
    def tokens_spared(self) -> float:
        """Share of this rank's tokens that have no row of their own, since a shared beginning has it."""
        tokens = sum(sum(micro.lengths) for micro in self.micro_batches)
        return 1 - sum(len(micro.tokens) for micro in self.micro_batches) / tokens

    @property
    def num_trajectories(self) -> int:
        return len(self.reward)

    @property
    def num_groups(self) -> int:
        return int(self.group_of_trajectory[-1]) + 1

    @property
    def group_of_token(self) -> Tensor:  # [T] int64
        return self.group_of_trajectory[self.trajectory_of_turn[self.turn_of_token]]

    @property
    def several_contexts(self) -> bool:
        """Whether some trajectory has more than one."""
        return self.num_contexts > self.num_trajectories

    @property
    def num_policy_tokens(self) -> int:
        return len(self.log_behaviour)


def pack_step(
    settings: Settings,
    trajectories: Sequence[Trajectory],
    over: Spread | None = None,
    *,
    needs: Requirements | None = None,
    whole: bool | None = None,
) -> PackedBatch:
    """The batch of a step as it is trained: failed trajectories are left out. `needs`: the learner's; None: those of
    the settings' recipe, which is loaded. `whole`: no trajectory is cut between contexts; None: as the recipe needs it.

    Every rank gives all trajectories, and gets the columns of all and micro-batches of its own share (`over`: the
    learner's). Raises RunFailed when no trajectory is usable.
    """
    usable = [t for t in trajectories if not t.failed]
    if not usable:
        raise RunFailed("the batch holds no usable trajectory")
    chosen = settings.trainer
    needs = requirements(load_recipe(settings.recipe)) if needs is None else needs
    if needs.before_forward:
        usable = pruned(usable, load_recipe(settings.recipe), needs, settings.task.reward_weights)
    teachers = teachers_of(settings.teachers) if needs.teacher else {}
    if asked := [NOTE + name for name, teacher in teachers.items() if teacher.address]:
        needs = dataclasses.replace(needs, noted=needs.noted.union(asked))
    apart = needs.per_trajectory_norms
    if whole is None:
        whole = apart or not any(t.contexts for t in usable)
    return pack_batch(
        usable,
        micro_batch_tokens=chosen.micro_batch_tokens,
        device=chosen.device,
        over=over,
        whole=whole,
        shared=chosen.shared_prefixes,
        apart=apart,
        needs=needs,
        reward_weights=settings.task.reward_weights,
        teachers=teachers,
    )


def pack_batch(
    trajectories: Sequence[Trajectory],
    *,
    micro_batch_tokens: int,
    device: str | torch.device = "cpu",
    over: Spread | None = None,
    whole: bool = True,
    shared: bool = False,
    apart: bool = False,
    needs: Requirements | None = None,
    reward_weights: Mapping[str, float] | None = None,
    teachers: Mapping[str, TeacherSettings] | None = None,
) -> PackedBatch:
    """Sort trajectories by group and sample, and pack them into micro-batches of at most `micro_batch_tokens` rows.

    A longer trajectory gets a micro-batch of its own, or without `whole` one for as many of its contexts as fit.
    `over`: ranks that share the batch. `shared`: beginnings that documents have in common are computed once; `apart`:
    but differentiated for each trajectory, which takes the memory of all tokens, so that all count. `needs`: of the
    recipe, whose notes become columns; `reward_weights`: of the parts of rewards among them.
    """
    assert trajectories, "a batch has at least one trajectory"
    ordered = sorted(trajectories, key=lambda t: (t.group, t.sample))
    policy_positions = [t.policy_positions() for t in ordered]
    for trajectory, where in zip(ordered, policy_positions, strict=True):
        begins = (trajectory.contexts and np.isin(where, trajectory.contexts).any()) or 0 in where[:1]  # they rise
        assert not begins, f"group {trajectory.group}: a policy token without a prompt"
    turns = [(i, turn) for i, trajectory in enumerate(ordered) for turn in trajectory.turns]
    turn_lengths = np.array([turn.length for _, turn in turns], np.int64)
    groups = np.unique([t.group for t in ordered], return_inverse=True)[1]
    agents = {name: i for i, name in enumerate(sorted({turn.agent for _, turn in turns} or {""}))}

    def tensor(values: object, dtype: torch.dtype) -> Tensor:  # [n]
        return torch.as_tensor(np.asarray(values)).to(dtype=dtype, device=device)

    pieces, policy_of_piece = ordered, policy_positions
    if not whole:
        pieces = list(chain.from_iterable(_pieces(t, micro_batch_tokens) for t in ordered))
        policy_of_piece = [t.policy_positions() for t in pieces]
    sizes = Sizes(pieces, shared=shared and not apart)
    share, parts = _divided(pieces, sizes, micro_batch_tokens, over, device)
    noted = Noted()
    if needs is not None and (needs.noted or needs.parts):
        noted = noted_columns(ordered, needs, reward_weights or {}, device)
    again = partial(
        pack_batch, micro_batch_tokens=micro_batch_tokens, device=device, over=over, whole=whole, shared=shared,
        apart=apart, needs=needs, reward_weights=reward_weights, teachers=teachers,
    )  # fmt: skip
    return PackedBatch(
        share=share,
        part=partial(_part, ordered, groups.tolist(), again),
        noted=noted,
        reused=reused_columns(ordered, device) if any(SOURCE in t.info for t in ordered) else None,
        forks=forks_among(ordered, device) if any(FORK in t.info for t in ordered) else None,
        cut=cut_among(ordered, device) if any(t.ended == "window" for t in ordered) else None,
        earlier=None if needs is None or not needs.earlier else earlier_of(ordered, partial(again, needs=None), device),
        greedy=greedy_among(ordered, device) if any(turn.temperature == GREEDY for _, turn in turns) else None,
        taught=taught(ordered, teachers, device) if teachers else {},
        micro_batches=tuple(_pack_parts(pieces, policy_of_piece, parts, device, sizes if shared else None)),
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


def _divided(
    pieces: Sequence[Trajectory], sizes: Sizes, limit: int, over: Spread | None, device: str | torch.device
) -> tuple[Share | None, Sequence[Sequence[int]]]:
    """This rank's share, None where it has all, and its micro-batches as indices of `pieces`."""
    if over is None:
        return None, [list(range(first, last)) for first, last in pairwise(cuts(sizes, limit))]
    made = plan(pieces, over, limit, sizes)
    return share_of(made, pieces, over, device, sizes), made[over.rank]


def _part(
    ordered: Sequence[Trajectory],
    groups: Sequence[int],
    pack: Callable[[Sequence[Trajectory]], PackedBatch],
    chosen: Collection[int],
) -> PackedBatch:
    """`PackedBatch.part`. groups: of each trajectory."""
    return pack([trajectory for trajectory, group in zip(ordered, groups, strict=True) if group in chosen])


def _pieces(trajectory: Trajectory, limit: int) -> list[Trajectory]:
    """A trajectory of more than `limit` tokens as pieces of at most so many, cut between contexts; a longer context is
    a piece of its own. Tokens, turns and contexts are those of the piece, all else is that of the trajectory."""
    if len(trajectory.tokens) <= limit or not trajectory.contexts:
        return [trajectory]
    starts = [0]
    for begin, end in trajectory.context_bounds():
        if end - starts[-1] > limit and begin > starts[-1]:
            starts.append(begin)
    return [
        replace(
            trajectory,
            tokens=trajectory.tokens[begin:end],
            turns=tuple(replace(t, start=t.start - begin) for t in trajectory.turns if _within(t, begin, end)),
            contexts=tuple(start - begin for start in trajectory.contexts if begin < start < end),
        )
        for begin, end in pairwise([*starts, len(trajectory.tokens)])
    ]


def _within(turn: Turn, begin: int, end: int) -> bool:
    return turn.length > 0 and begin <= turn.start < end


def _pack_parts(
    ordered: Sequence[Trajectory],
    policy_positions: Sequence[np.ndarray],
    parts: Sequence[Sequence[int]],
    device: str | torch.device,
    sizes: Sizes | None,
) -> list[MicroBatch]:
    """A micro-batch for each part (indices of trajectories), one behind the other in this order.

    policy_positions: of each trajectory, where its policy tokens stand in it, [its policy tokens]. sizes: None shares
    no prefix.
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
        documents = tuple(chain.from_iterable(ordered[i].context_lengths() for i in part))
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in documents])
        sampled = np.concatenate([w + s for w, s in zip(where, starts, strict=True)])
        tree = None if sizes is None else _tree([ordered[i] for i in part], [sizes.prefix[i] for i in part])
        predictors, targets, rows = sampled - 1, tokens[sampled], sampled
        predicting, place = predictors, None
        if tree is not None:
            tokens, positions = tokens[tree.token_of_row], positions[tree.token_of_row]
            predictors, rows = tree.row_of_token[predictors], tree.row_of_token[sampled]
            predicting, place = np.unique(predictors, return_inverse=True)
        out.append(
            MicroBatch(
                tokens=torch.from_numpy(tokens).to(device),
                positions=torch.from_numpy(positions).to(device),
                lengths=tuple(lengths),
                documents=documents,
                predictors=torch.from_numpy(predictors).to(device),
                predictor_tokens=torch.from_numpy(sampled - 1).to(device),
                predicting=torch.from_numpy(predicting).to(device),
                sampled=torch.from_numpy(rows).to(device),
                place=None if place is None else torch.from_numpy(place).to(device),
                targets=torch.from_numpy(targets).to(device),
                trajectories=slice(first, first + len(part)),
                policy=slice(policy_start, policy_start + len(sampled)),
                policy_lengths=tuple(len(w) for w in where),
                stretch=_stretch([ordered[i] for i in part], device),
                counted=len(tokens) if sizes is None or sizes.shared else sum(lengths),
                tree=tree,
            )
        )
        first += len(part)
        policy_start += len(sampled)
    return out


def _tree(trajectories: Sequence[Trajectory], prefixes: Sequence[int]) -> PrefixTree | None:
    """The tree of these trajectories' contexts; None where nothing is shared. prefixes: as `Sizes.prefix`."""
    documents, groups, planned = [], [], []
    for trajectory, prefix in zip(trajectories, prefixes, strict=True):
        for begin, end in trajectory.context_bounds():
            documents.append(trajectory.tokens[begin:end])
            groups.append(trajectory.group)
            planned.append(prefix)
    tree = make_tree(documents, groups=groups, planned=planned)
    return tree if tree.num_rows < len(tree.row_of_token) else None


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
        predictor_tokens=zero,
        predicting=zero,
        sampled=zero + 1,
        place=None,
        targets=zero,
        trajectories=slice(first, first),
        policy=slice(policy_start, policy_start),
        policy_lengths=(1,),
        counted=2,
        idle=True,
    )
