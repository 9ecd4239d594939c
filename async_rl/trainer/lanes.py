"""A micro-batch in several parts that are computed side by side on a CPU, each by a thread of its own (a lane).

Threads that share each operation are woken for each and wait for each other in each, for long where a generator is at
work on the same cores. Lanes are woken twice a step. Parts are whole subtrees of the shared prefixes, of about equally
many rows; a beginning that all trajectories have in common is computed in each. Gradients of the parts are added in a
fixed order, so a step is the same bits every time with as many lanes and threads. Each lane holds its own gradient.

Shapes: N rows and t policy tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.model.decoder import Decoder
from async_rl.model.prefix_tree import PrefixTree, Run
from async_rl.trainer.arithmetic import ModelArithmetic
from async_rl.trainer.packing import MicroBatch, Rows
from async_rl.trainer.ranks import is_sharded
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from numpy.typing import NDArray

Made = TypeVar("Made")
Given = TypeVar("Given")

LEAST_ROWS = 256
"""of a part"""
MOST_REPEATED = 0.1
"""rows that every part computes, as a share of all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Rows):
    """What one lane computes: rows of a micro-batch."""

    chosen: Tensor  # [its policy tokens] int64
    """which of the micro-batch's they are"""


Compute = Callable[[Part], LogProbs]
"""a part's forward"""


def lane_parts(model: object, micro: MicroBatch, arithmetic: ModelArithmetic) -> list[Part]:
    """What is computed side by side; none where lanes do not serve: one lane, another device, another model than the
    built-in decoder, too few rows, or no place to divide them at."""
    if arithmetic.lanes < 2 or micro.tokens.device.type != "cpu" or not isinstance(model, Decoder) or is_sharded(model):
        return []
    return divided(micro, arithmetic.lanes)


def side_by_side(model: Decoder, parts: Sequence[Part], compute: Compute) -> LogProbs:
    """The columns of all policy tokens of a micro-batch, [t] each; `compute` gives those of a part."""
    if not torch.is_grad_enabled():
        columns = _together(parts, in_lanes(partial(_computed, compute, False), parts))
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        columns = _SideBySide.apply(parts, compute, parameters, *parameters)
    log_prob, entropy, square, proxy = columns
    assert log_prob is not None
    assert entropy is not None
    assert square is not None
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square, log_proxy=proxy)


Found = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""the columns of LogProbs; only the first three are differentiable"""


def _computed(compute: Compute, graph: bool, part: Part) -> Found:
    with torch.set_grad_enabled(graph):
        found = compute(part)
        return found.log_prob, found.entropy, found.prob_square_sum, found.log_proxy


def _together(parts: Sequence[Part], found: Sequence[Found]) -> tuple[Tensor | None, ...]:
    """The columns of all parts, each in the order of the micro-batch, without their graphs."""
    columns: list[Tensor | None] = []
    for some in zip(*found, strict=True):
        if some[0] is None:
            columns.append(None)
            continue
        column = some[0].new_empty(sum(len(part.chosen) for part in parts))
        for part, own in zip(parts, some, strict=True):
            column[part.chosen] = own.detach()
        columns.append(column)
    return tuple(columns)


class _SideBySide(torch.autograd.Function):
    """Every part has a graph of its own; the parameters are arguments so that their gradients are asked for here."""

    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], compute: Compute, own: list[Tensor], *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.found = in_lanes(partial(_computed, compute, True), parts)
        ctx.parts, ctx.own = parts, own
        ctx.set_materialize_grads(False)
        columns = _together(parts, ctx.found)
        if columns[3] is not None:
            ctx.mark_non_differentiable(columns[3])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *pulls: Tensor | None) -> tuple[Tensor | None, ...]:
        def of_part(pair: tuple[Part, Found]) -> Sequence[Tensor | None]:
            part, columns = pair
            asked = [(c, pull[part.chosen]) for c, pull in zip(columns[:3], pulls, strict=False) if pull is not None]
            outputs, gradients = zip(*asked, strict=True)
            return torch.autograd.grad(outputs, ctx.own, gradients, retain_graph=True, allow_unused=True)

        totals: list[Tensor | None] = [None] * len(ctx.own)
        for found in in_lanes(of_part, list(zip(ctx.parts, ctx.found, strict=True))):
            totals = [b if a is None else a if b is None else a.add_(b) for a, b in zip(totals, found, strict=True)]
        return None, None, None, *totals


def in_lanes(function: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    """The function of each, all at the same time: the last in this thread. They share its threads."""
    with one_lane(len(given)):
        pool = _pool(len(given) - 1, torch.get_num_threads())
        waiting = [pool.submit(function, one) for one in given[:-1]]
        last = function(given[-1])
        return [*(future.result() for future in waiting), last]


@contextmanager
def one_lane(lanes: int) -> Iterator[None]:
    """Inside, this thread computes with its share of the threads, one of `lanes`. It also serves small computations,
    like a probe: more threads would wait for each other where a generator takes the cores, and make them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // lanes))  # OpenMP keeps the number for each thread, MKL for the process
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(lanes, "lane", initializer=torch.set_num_threads, initargs=(threads,))


# ---------------------------------------------------------------- how rows are divided


def divided(micro: MicroBatch, lanes: int) -> list[Part]:
    """At most `lanes` parts with about equally many rows, all predicting rows once and in order. One part: there is
    nothing to divide."""
    rows = len(micro.tokens)
    common, starts = _subtrees(micro)  # the first `common` rows are before all others
    ideal = [common + (rows - common) * lane // lanes for lane in range(1, lanes)]
    cuts = sorted({min(starts, key=lambda start: (abs(start - wanted), start)) for wanted in ideal})
    bounds = [0, *(cut for cut in cuts if cut > common), rows]
    small = min(end - begin for begin, end in pairwise(bounds)) < LEAST_ROWS
    if len(bounds) < 3 or small or common * (len(bounds) - 2) > MOST_REPEATED * rows:
        return []
    predicting = micro.predicting.numpy()
    if (np.diff(predicting) < 0).any():
        return []
    found = [_part(micro, predicting, common, begin, end) for begin, end in pairwise(bounds)]
    return found if all(len(part.chosen) for part in found) else []


def _subtrees(micro: MicroBatch) -> tuple[int, list[int]]:
    """(rows that are before all others, rows with which subtrees behind them begin)."""
    if micro.tree is None:
        return 0, [0, *np.cumsum(micro.documents)[:-1].tolist()]
    common, rows = 0, micro.tree.num_rows
    starts: list[int] = []
    behind = 0
    for run in micro.tree.runs:
        if run.begin == common and run.end < run.last == rows:
            common = behind = run.end
        elif run.begin == behind:
            starts.append(run.begin)
            behind = run.last
    return common, starts


def _part(micro: MicroBatch, predicting: NDArray[np.int64], common: int, begin: int, end: int) -> Part:
    """Rows begin <= row < end, with the `common` first ones before them."""
    kept = np.arange(begin, end) if begin == 0 else np.concatenate((np.arange(common), np.arange(begin, end)))
    shift = 0 if begin == 0 else begin - common
    rows = torch.from_numpy(kept)
    own = predicting[(predicting >= begin) & (predicting < end)]
    predictors = micro.predictors.numpy()
    chosen = torch.from_numpy(np.flatnonzero((predictors >= begin) & (predictors < end)))
    if micro.tree is None:
        bounds = np.cumsum((0, *micro.documents))
        first, last = np.searchsorted(bounds, (begin, end))
        documents, tree = micro.documents[first:last], None
    else:
        tree = _subtree(micro.tree, common, begin, end)
        documents = tree.documents
    return Part(
        tokens=micro.tokens[rows],
        positions=micro.positions[rows],
        predicting=torch.from_numpy(own - shift),
        place=None if micro.place is None else torch.from_numpy(np.searchsorted(own, predictors[chosen.numpy()])),
        targets=micro.targets[chosen],
        stretch=None if micro.stretch is None else micro.stretch[chosen],
        documents=documents,
        tree=tree,
        chosen=chosen,
    )


def _subtree(tree: PrefixTree, common: int, begin: int, end: int) -> PrefixTree:
    """The tree of `_part`'s rows. Documents that end within the common rows belong to the first part."""
    shift = 0 if begin == 0 else begin - common
    rows = end - shift
    lasts = tree.row_of_token[np.cumsum(tree.documents) - 1]
    of_document = np.split(tree.row_of_token, np.cumsum(tree.documents)[:-1])
    mine = [d for d, last in zip(of_document, lasts, strict=True) if begin <= last < end]
    row_of_token = np.concatenate(mine)
    row_of_token = np.where(row_of_token >= begin, row_of_token - shift, row_of_token)
    token_of_row = np.empty(rows, np.int64)
    token_of_row[row_of_token[::-1]] = np.arange(len(row_of_token))[::-1]  # the first of a row's tokens is written last
    runs = [
        Run(begin=run.begin, end=run.end, last=rows)
        if run.begin < common
        else Run(begin=run.begin - shift, end=run.end - shift, last=run.last - shift)
        for run in tree.runs
        if run.begin < common or begin <= run.begin < end
    ]
    return PrefixTree(
        runs=tuple(runs),
        documents=tuple(map(len, mine)),
        row_of_token=row_of_token,
        token_of_row=token_of_row,
    )
