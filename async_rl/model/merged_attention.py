"""Attention among the rows of a tree on a CPU, forward and backward.

Where there is a compiler one C function does it, run by run (`CompiledParts`). Else it is computed by parts whose
results are merged by their log-sum-exp. The parts are torch's own kernel for a CPU, which returns the log-sum-exp of
each query's scores. The gradient of a part is that of an attention with the merged output and log-sum-exp: with
p = exp(score - log-sum-exp), d(score) = p (d(p) - <d(out), out>) holds whatever else the sum is over.

Shapes: R rows, H query heads, KV heads of keys and values, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_rl.model.attention import MAX_PADDING, make_buckets
from async_rl.model.prefix_tree import PrefixTree, Run
from async_rl.model.repeats import Repeats
from async_rl_kernels import native

WIDTH = native.WIDTH
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


MOST_KEYS = 1024
"""of a row: with more, torch's products of whole blocks are the faster way"""


class Parts(Protocol):
    """Attention among rows, each of which sees certain others."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """query [R, H, D], key and value [R, KV, D] -> output [R, H, D] and log-sum-exp [R, H]."""
        ...

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. saved: these, the output and the log-sum-exp."""
        ...


def parts_of(tree: PrefixTree) -> Parts:
    """Attention among the rows of a tree."""
    return EitherParts(compiled=CompiledParts.of_tree(tree), torchs=lambda: TreeParts(tree))


def documents_of(tree: PrefixTree) -> Parts:
    """Attention among the tokens of a tree's documents, one behind the other."""
    return EitherParts(compiled=CompiledParts.of_documents(tree.documents), torchs=lambda: Blocks(tree.documents))


class EitherParts:
    """Compiled functions where they take these tensors, else torch's."""

    def __init__(self, *, compiled: CompiledParts | None, torchs: Callable[[], Parts]) -> None:
        self._compiled, self._make = compiled, torchs
        self._made: Parts | None = None

    def _parts(self, query: Tensor, *others: Tensor) -> Parts:
        if self._compiled is not None and query.shape[-1] in native.HEAD_SIZES and native.usable(query, *others):
            return self._compiled
        self._made = self._made or self._make()
        return self._made

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._parts(query, key, value).forward(query, key, value)

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self._parts(*saved[:3]).backward(gradient, saved)


class CompiledParts:
    """`Parts` of compiled functions, for float32 on a CPU and heads of native.HEAD_SIZES."""

    def __init__(self, runs: list[tuple[int, int, int]], longest: int) -> None:
        """runs: (begin, end, number of the run above or -1), each behind the one above it. longest: most keys of a
        row, each run's rounded up to native.WIDTH."""
        self.runs = torch.tensor(runs, dtype=torch.int64)
        self.longest = longest

    @classmethod
    def of_tree(cls, tree: PrefixTree) -> CompiledParts | None:
        """None where chains of runs are too long or deep."""
        above: list[int] = []
        runs: list[tuple[int, int, int]] = []
        longest = deepest = 0
        for number, run in enumerate(tree.runs):
            while above and run.begin >= tree.runs[above[-1]].last:
                above.pop()
            runs.append((run.begin, run.end, above[-1] if above else -1))
            above.append(number)
            longest = max(longest, sum(-(-(tree.runs[n].end - tree.runs[n].begin) // WIDTH) * WIDTH for n in above))
            deepest = max(deepest, len(above))
        return cls(runs, longest) if longest <= MOST_KEYS and deepest <= native.DEPTH else None

    @classmethod
    def of_documents(cls, lengths: Sequence[int]) -> CompiledParts | None:
        """None where one is too long."""
        ends = list(accumulate(lengths))
        longest = -(-max(lengths) // WIDTH) * WIDTH
        runs = [(end - length, end, -1) for end, length in zip(ends, lengths, strict=True)]
        return cls(runs, longest) if longest <= MOST_KEYS else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, log_sum = query.new_empty(query.shape), query.new_empty(query.shape[:2])
        inputs, arguments = self._arguments(query, key, value, out, log_sum)
        self._call("tree_forward", arguments)
        del inputs
        return out, log_sum

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, log_sum = saved
        found = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        inputs, arguments = self._arguments(query, key, value, out, log_sum)
        gradient = _heads_in_rows(gradient)
        arguments.gradient, arguments.gradient_stride = gradient.data_ptr(), gradient.stride(0)
        arguments.of_query, arguments.of_key, arguments.of_value = (tensor.data_ptr() for tensor in found)
        self._call("tree_backward", arguments)
        del inputs
        return found

    def _arguments(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor
    ) -> tuple[tuple[Tensor, ...], native.Tree]:
        """(tensors that must live as long, the argument)"""
        query, key, value = inputs = tuple(map(_heads_in_rows, (query, key, value)))
        rows, heads, size = query.shape
        return inputs, native.Tree(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            query_stride=query.stride(0),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            runs=self.runs.data_ptr(),
            count=len(self.runs),
            rows=rows,
            heads=heads,
            kv_heads=key.shape[1],
            size=size,
            longest=self.longest,
            scale=size**-0.5,
            threads=torch.get_num_threads(),
            out=out.data_ptr(),
            log_sum=log_sum.data_ptr(),
        )

    @staticmethod
    def _call(name: str, arguments: native.Tree) -> None:
        library = native.library()
        assert library is not None
        if getattr(library, name)(arguments):
            raise MemoryError(f"attention of {arguments.rows} rows finds no memory")


def _heads_in_rows(tensor: Tensor) -> Tensor:
    """[R, heads, D], the elements of a row contiguous."""
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()


class Blocks:
    """Consecutive rows, each block causally within itself; blocks of similar length padded together."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._buckets = make_buckets(lengths, torch.device("cpu"))
        sizes = [bucket.gather.numel() for bucket in self._buckets]
        real = torch.zeros(sum(sizes), dtype=torch.bool)
        real[self._buckets[0].restore] = True
        self._padding = [(~part).nonzero().squeeze(-1) for part in real.split(sizes)]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """query [R, H, D], key and value [R, KV, D] -> output [R, H, D] and log-sum-exp [R, H], both float32 or
        better."""
        outs, logs = [], []
        for bucket in self._buckets:
            every = (rows_of(tensor, bucket.gather).transpose(1, 2) for tensor in (query, key, value))
            part, log = _attend(*every, 0.0, True)
            outs.append(part.transpose(1, 2).flatten(0, 1))
            logs.append(log.transpose(1, 2).flatten(0, 1))
        log_sum = self._restored(logs)
        return self._restored(outs).to(log_sum.dtype), log_sum

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. saved: these, the output and the log-sum-exp."""
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for bucket, padding in zip(self._buckets, self._padding, strict=True):
            q, k, v, out, log = (rows_of(tensor, bucket.gather).transpose(1, 2) for tensor in saved)
            part = rows_of(gradient, bucket.gather)
            part.flatten(0, 1).index_fill_(0, padding, 0)  # then no gradient passes through padding
            of_inputs = _attend_backward(part.transpose(1, 2), q, k, v, out, log.contiguous(), 0.0, True)
            for every, more in zip(found, of_inputs, strict=True):
                every.append(more.transpose(1, 2).flatten(0, 1))
        query, key, value = (self._restored(every) for every in found)
        return query, key, value

    def _restored(self, parts: list[Tensor]) -> Tensor:
        every = parts[0] if len(parts) == 1 else torch.cat(parts)
        return every.index_select(0, self._buckets[0].restore)


def rows_of(tensor: Tensor, gather: Tensor) -> Tensor:
    """tensor [R, ...], gather [blocks, longest] -> [blocks, longest, ...]; one index is twice as fast as two."""
    return tensor.index_select(0, gather.flatten()).unflatten(0, gather.shape)


class TreeParts:
    """What is computed for the rows of a tree: runs as blocks, then each shared run against all rows behind it."""

    def __init__(self, tree: PrefixTree) -> None:
        self.runs = Blocks([run.end - run.begin for run in tree.runs])
        by_length: dict[int, list[Run]] = {}
        for run in tree.runs:
            if run.last > run.end:
                by_length.setdefault(run.end - run.begin, []).append(run)
        self.rectangles = [Rectangle(runs) for _, every in sorted(by_length.items()) for runs in _alike(every)]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Blocks.forward`; the output has the dtype of the query."""
        heads, kv_heads = query.shape[1], key.shape[1]
        out, log_sum = self.runs.forward(query, key, value)
        for rectangle in self.rectangles:
            keys, values = rectangle.take_keys(key), rectangle.take_keys(value)
            part, log = _attend(rectangle.fold(query, kv_heads), keys, values, 0.0, False)
            more, more_log = rectangle.unfold(part, heads), rectangle.unfold(log, heads)
            before = rectangle.behind(log_sum)
            total = torch.logaddexp(before, more_log)
            merged = rectangle.behind(out) * (before - total).exp_()[..., None]
            rectangle.put(out, merged.add_(more * (more_log - total).exp_()[..., None]))
            rectangle.put(log_sum, total)
        return out.to(query.dtype), log_sum

    def backward(self, gradient: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `Blocks.backward`."""
        query, key, value, out, log_sum = saved
        heads, kv_heads = query.shape[1], key.shape[1]
        of_query, of_key, of_value = self.runs.backward(gradient, saved)
        for rectangle in self.rectangles:
            q, o, log = (rectangle.fold(tensor, kv_heads) for tensor in (query, out, log_sum))
            k, v = rectangle.take_keys(key), rectangle.take_keys(value)
            part = rectangle.fold_padded(gradient, kv_heads)
            more, more_key, more_value = _attend_backward(part, q, k, v, o, log, 0.0, False)
            of_query.index_add_(0, rectangle.rows, rectangle.unfold(more, heads))  # each row once: the order is fixed
            of_key.index_add_(0, rectangle.keys.flatten(), more_key.transpose(1, 2).flatten(0, 1))
            of_value.index_add_(0, rectangle.keys.flatten(), more_value.transpose(1, 2).flatten(0, 1))
        return of_query, of_key, of_value


class Rectangle:
    """n shared runs of equal length as keys, the rows behind each as queries, padded to as many (`most`)."""

    def __init__(self, runs: list[Run]) -> None:
        size = torch.tensor([run.last - run.end for run in runs])[:, None]
        begin, behind = (torch.tensor(values)[:, None] for values in ([r.begin for r in runs], [r.end for r in runs]))
        column = torch.arange(int(size.max()))[None, :]
        self.span = slice(runs[0].end, runs[0].last) if len(runs) == 1 else None  # the same as `rows`
        self.keys = begin + torch.arange(runs[0].end - runs[0].begin)[None, :]  # [n, length] int64, rows
        self.queries = behind + torch.minimum(column, size - 1)  # [n, most] int64, rows
        self.real = (column < size).flatten().nonzero().squeeze(-1)  # [rows behind] int64, into flattened `queries`
        self.rows = self.queries.flatten()[self.real]  # [rows behind] int64, each once
        self.padding = (column >= size).flatten().nonzero().squeeze(-1)  # int64, into flattened `queries`

    def fold(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """Rows of queries [R, H, ...] -> [n, KV, most * H / KV, ...]: heads that share keys become rows of one."""
        taken = tensor[self.span] if self.span is not None else tensor.index_select(0, self.queries.flatten())
        return self._folded(taken, kv_heads)

    def fold_padded(self, tensor: Tensor, kv_heads: int) -> Tensor:
        """Like `fold`, but padding is 0."""
        if not len(self.padding):
            return self.fold(tensor, kv_heads)
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

    def behind(self, tensor: Tensor) -> Tensor:
        """Its rows as queries, [R, ...] -> [rows behind, ...], in the order of `rows`."""
        return tensor[self.span] if self.span is not None else tensor.index_select(0, self.rows)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """The inverse: overwrite these rows of `tensor` [R, ...]."""
        if self.span is not None:
            tensor[self.span] = values
        else:
            tensor.index_copy_(0, self.rows, values)

    def take_keys(self, tensor: Tensor) -> Tensor:  # [R, KV, D] -> [n, KV, length, D]
        return rows_of(tensor, self.keys).transpose(1, 2)


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


class TreeProduct(torch.autograd.Function):
    """query [R, H, D], key and value [R, KV, D] -> [R, H, D] among the rows of a tree."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
        out, log_sum = parts.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *ctx.parts.backward(gradient, ctx.saved_tensors), None


class RepeatedProduct(torch.autograd.Function):
    """The same for tokens of which several are one row: query, key and value of all tokens of the documents, which are
    equal where the row is. Computed by row, differentiated by token, so that every document has its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, documents: Parts, repeats: Repeats
    ) -> Tensor:
        out, log_sum = parts.forward(*(tensor.index_select(0, repeats.one) for tensor in (query, key, value)))
        out = out.index_select(0, repeats.rows)
        ctx.save_for_backward(query, key, value, out, log_sum.index_select(0, repeats.rows))
        ctx.documents = documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        return *ctx.documents.backward(gradient, ctx.saved_tensors), None, None, None
