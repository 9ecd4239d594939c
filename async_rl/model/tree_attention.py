"""Attention among documents that begin alike: the `Attention` of a packed tree (prefix_tree.py).

A row of a tree attends to its own run up to itself and to all runs before that. Three ways, the first that fits:
- a CUDA kernel for documents of unequal lengths takes each run's rows as queries and everything before and in the run
  as keys (gathered, so that a shared key lies there once for each run behind it). Such kernels align causal attention
  and windows at the last query and the last key, so one call does all;
- on a CPU without window and cap: each run as a small document, then every shared run against all rows behind it, one
  rectangle without a mask, the results merged by their log-sum-exp. No score is computed twice;
- else documents are laid out unshared for the attention alone, with every shared row repeated.

Shapes: R rows, H query heads, KV heads of keys and values, D head_dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.model.attention import MAX_PADDING, DocumentAttention, half_precision, make_buckets
from async_rl.model.prefix_tree import PrefixTree, Run
from async_rl.model.varlen import Kernel


class TreeAttention:
    """Causal attention among the rows of a tree, the same as among its documents packed one behind the other."""

    def __init__(self, tree: PrefixTree, kernel: Kernel | None = None) -> None:
        self.tree = tree
        self._kernel = kernel
        self._longest = max(tree.documents)
        self._documents = DocumentAttention(tree.documents, kernel)
        self._parts: Parts | None = None
        self._paths: Paths | None = None
        self._unshared: tuple[Repeats, Tensor] | None = None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [R, H, D], key and value [R, KV, D] -> [R, H, D]; `window` and `cap` as in `decoder.Attention`."""
        if query.shape[0] != self.tree.num_rows:
            raise ValueError(f"{query.shape[0]} tokens for a tree of {self.tree.num_rows} rows")
        if window >= self._longest:
            window = 0
        if self._kernel is not None and not cap and (dtype := half_precision(query)) is not None:
            return self._through_kernel(query.to(dtype), key.to(dtype), value.to(dtype), window)
        if not window and not cap and query.device.type == "cpu":
            if torch.is_autocast_enabled("cpu"):  # as it does for torch's own attention
                dtype = torch.get_autocast_dtype("cpu")
                query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if self._parts is None:
                self._parts = Parts(self.tree)
            out: Tensor = _Merged.apply(query, key, value, self._parts)
            return out
        return self._laid_out(layer, query, key, value, window, cap)

    def _laid_out(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int, cap: float) -> Tensor:
        if self._unshared is None or self._unshared[1].device != query.device:
            rows = torch.from_numpy(self.tree.row_of_token).to(query.device)
            tokens = torch.from_numpy(self.tree.token_of_row).to(query.device)
            self._unshared = Repeats(rows, self.tree.num_rows), tokens
        repeats, tokens = self._unshared
        query, key, value = (repeats.take(tensor) for tensor in (query, key, value))
        return self._documents(layer, query, key, value, window=window, cap=cap).index_select(0, tokens)

    def _through_kernel(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        assert self._kernel is not None
        if self._paths is None or self._paths.bounds.device != query.device:
            self._paths = Paths(self.tree, query.device)
        paths = self._paths
        key, value = paths.keys.take(key), paths.keys.take(value)
        bounds, longest = (paths.bounds, paths.key_bounds), (paths.longest, paths.longest_key)
        return self._kernel(query, key, value, bounds, longest, window)


class Repeats:
    """Rows taken several times, with a gradient that adds the copies of a row in a fixed order and in float32 or
    better."""

    def __init__(self, rows: Tensor, num_rows: int) -> None:
        """rows: [copies] int64, each row at least once."""
        self.rows = rows
        self.order = torch.argsort(rows, stable=True)  # [copies]: those of the first row, of the second, ...
        counts = torch.bincount(rows, minlength=num_rows)
        self.first = counts.cumsum(0) - counts  # [rows]

    def take(self, tensor: Tensor) -> Tensor:
        """[rows, ...] -> [copies, ...]"""
        out: Tensor = _Take.apply(tensor, self)
        return out

    def sums(self, copies: Tensor) -> Tensor:
        """Sum over the copies of each row: [copies, ...] -> [rows, ...], float32 or better."""
        flat = copies.flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        found = F.embedding_bag(self.order, flat, self.first, mode="sum")
        return found.unflatten(1, copies.shape[1:])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, repeats: Repeats) -> Tensor:
        ctx.repeats = repeats
        return tensor.index_select(0, repeats.rows)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.repeats.sums(gradient).to(gradient.dtype), None


class Paths:
    """Runs as the documents of a kernel: queries are the run's rows, keys all rows before and in it."""

    def __init__(self, tree: PrefixTree, device: torch.device) -> None:
        rows: list[np.ndarray] = []
        above: list[Run] = []
        for run in tree.runs:
            above = [*(other for other in above if run.begin < other.last), run]
            rows.append(np.concatenate([np.arange(other.begin, other.end) for other in above]))
        queries, keys = [run.end - run.begin for run in tree.runs], [len(path) for path in rows]
        self.keys = Repeats(torch.from_numpy(np.concatenate(rows)).to(device), tree.num_rows)
        self.bounds = _bounds(queries, device)
        self.key_bounds = _bounds(keys, device)
        self.longest, self.longest_key = max(queries), max(keys)


def _bounds(lengths: list[int], device: torch.device) -> Tensor:  # [lengths + 1] int32
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


class Parts:
    """What is computed for the rows of a tree on a CPU: runs for themselves, then rectangles."""

    def __init__(self, tree: PrefixTree) -> None:
        self.runs = make_buckets([run.end - run.begin for run in tree.runs], torch.device("cpu"))
        real = torch.zeros(sum(bucket.gather.numel() for bucket in self.runs), dtype=torch.bool)
        real[self.runs[0].restore] = True
        sizes = [bucket.gather.numel() for bucket in self.runs]
        self.padding = [(~part).nonzero().squeeze(-1) for part in real.split(sizes)]
        """of each bucket, into its flattened `gather`"""
        by_length: dict[int, list[Run]] = {}
        for run in tree.runs:
            if run.last > run.end:
                by_length.setdefault(run.end - run.begin, []).append(run)
        self.rectangles = [Rectangle(runs) for _, every in sorted(by_length.items()) for runs in _alike(every)]


class Rectangle:
    """n shared runs of equal length as keys, the rows behind each as queries, padded to as many (`most`)."""

    def __init__(self, runs: list[Run]) -> None:
        size = torch.tensor([run.last - run.end for run in runs])[:, None]
        begin, behind = (torch.tensor(values)[:, None] for values in ([r.begin for r in runs], [r.end for r in runs]))
        column = torch.arange(int(size.max()))[None, :]
        self.keys = begin + torch.arange(runs[0].end - runs[0].begin)[None, :]  # [n, length] int64, rows
        self.queries = behind + torch.minimum(column, size - 1)  # [n, most] int64, rows
        self.real = (column < size).flatten().nonzero().squeeze(-1)  # [rows behind] int64, into flattened `queries`
        self.rows = self.queries.flatten()[self.real]  # [rows behind] int64, each once
        self.padding = (column >= size).flatten().nonzero().squeeze(-1)  # int64, into flattened `queries`

    def fold(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """Rows of queries [R, H, ...] -> [n, KV, most * H / KV, ...]: heads that share keys become rows of one."""
        return self._folded(tensor.index_select(0, self.queries.flatten()), kv_heads)

    def fold_padded(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """Like `fold`, but padding is 0."""
        return self._folded(tensor.index_select(0, self.queries.flatten()).index_fill_(0, self.padding, 0), kv_heads)

    def _folded(self, taken: Tensor, kv_heads: int) -> Tensor:
        apart = taken.unflatten(0, self.queries.shape).unflatten(2, (kv_heads, -1))  # [n, most, KV, H / KV, ...]
        return apart.transpose(1, 2).flatten(2, 3)

    def unfold(self, folded: Tensor, heads: int) -> Tensor:
        """The inverse, without padding: [n, KV, most * H / KV, ...] -> [rows behind, H, ...], ordered as `rows`."""
        most = self.queries.shape[1]
        apart = folded.unflatten(2, (most, -1)).transpose(1, 2).flatten(2, 3)  # [n, most, H, ...]
        assert apart.shape[2] == heads
        return apart.flatten(0, 1).index_select(0, self.real) if len(self.padding) else apart.flatten(0, 1)

    def take_keys(self, tensor: Tensor) -> Tensor:  # [R, KV, D] -> [n, KV, length, D]
        return tensor.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape).transpose(1, 2)


def _alike(runs: list[Run]) -> list[list[Run]]:
    """Runs by falling number of rows behind them, cut where padding would exceed a quarter. No run of a list lies
    behind another of it, so that each row is in a list at most once."""
    found: list[list[Run]] = []
    filled = 0
    for run in sorted(runs, key=lambda r: (r.end - r.last, r.begin)):
        behind = run.last - run.end
        place = found[-1] if found else []
        padded = (place[0].last - place[0].end) * (len(place) + 1) if place else 0
        nested = any(other.end <= run.begin < other.last for other in place)
        if place and not nested and padded <= MAX_PADDING * (filled + behind):
            place.append(run)
            filled += behind
        else:
            found.append([run])
            filled = behind
    return found


_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Merged(torch.autograd.Function):
    """query [R, H, D], key and value [R, KV, D] -> [R, H, D], by parts.

    The gradient of each part is that of an attention with the merged output and log-sum-exp, since
    d(score) = p (d(p) - <d(out), out>) with p = exp(score - log-sum-exp) holds whatever else the sum is over.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        outs, logs = [], []
        for bucket in parts.runs:
            every = (tensor[bucket.gather].transpose(1, 2) for tensor in (query, key, value))
            part, log = _attend(*every, 0.0, True)
            outs.append(part.transpose(1, 2).flatten(0, 1))
            logs.append(log.transpose(1, 2).flatten(0, 1))
        restore = parts.runs[0].restore
        log_sum = torch.cat(logs).index_select(0, restore)  # [R, H], float32 or better
        out = torch.cat(outs).index_select(0, restore).to(log_sum.dtype)
        for rectangle in parts.rectangles:
            keys, values = rectangle.take_keys(key), rectangle.take_keys(value)
            part, log = _attend(rectangle.fold(query, kv_heads), keys, values, 0.0, False)
            more, more_log = rectangle.unfold(part, heads), rectangle.unfold(log, heads)
            rows = rectangle.rows
            before = log_sum[rows]
            total = torch.logaddexp(before, more_log)
            merged = out[rows] * (before - total).exp_()[..., None]
            out[rows] = merged.add_(more * (more_log - total).exp_()[..., None])
            log_sum[rows] = total
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        found: list[list[Tensor]] = [[], [], []]
        for bucket, padding in zip(ctx.parts.runs, ctx.parts.padding, strict=True):
            rows = bucket.gather
            q, k, v, o, log = (t[rows].transpose(1, 2) for t in (query, key, value, out, log_sum))
            part = gradient[rows]
            part.flatten(0, 1).index_fill_(0, padding, 0)  # then no gradient passes through padding
            for total, more in zip(
                found, _attend_backward(part.transpose(1, 2), q, k, v, o, log.contiguous(), 0.0, True), strict=True
            ):
                total.append(more.transpose(1, 2).flatten(0, 1))
        restore = ctx.parts.runs[0].restore
        d_query, d_key, d_value = (torch.cat(part).index_select(0, restore) for part in found)
        for rectangle in ctx.parts.rectangles:
            q, o, log = (rectangle.fold(tensor, kv_heads) for tensor in (query, out, log_sum))
            k, v = rectangle.take_keys(key), rectangle.take_keys(value)
            part = rectangle.fold_padded(gradient, kv_heads)
            of_query, of_key, of_value = _attend_backward(part, q, k, v, o, log, 0.0, False)
            d_query[rectangle.rows] += rectangle.unfold(of_query, heads)
            d_key[rectangle.keys] += of_key.transpose(1, 2)
            d_value[rectangle.keys] += of_value.transpose(1, 2)
        return d_query, d_key, d_value, None
