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

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from async_rl.model.attention import DocumentAttention, bounds_of, half_precision
from async_rl.model.merged_attention import CompiledParts, Parts, RepeatedProduct, TreeProduct, documents_of, parts_of
from async_rl.model.prefix_tree import PrefixTree, Run
from async_rl.model.repeats import Repeats
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
        self._repeats: Repeats | None = None

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
                self._parts = parts_of(self.tree)
            out: Tensor = TreeProduct.apply(query, key, value, self._parts)
            return out
        return self._laid_out(layer, query, key, value, window, cap)

    def trees(self, windows: Sequence[int]) -> CompiledParts | None:
        """What says which row attends to which, for functions that compute several layers at once, with these windows,
        on a CPU; None where other ways than the compiled one serve."""
        if any(0 < window < self._longest for window in windows):
            return None
        return CompiledParts.of_tree(self.tree)

    def _laid_out(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int, cap: float) -> Tensor:
        if self._repeats is None or self._repeats.rows.device != query.device:
            self._repeats = repeats_of(self.tree, query.device)
        query, key, value = (self._repeats.take(tensor) for tensor in (query, key, value))
        return self._documents(layer, query, key, value, window=window, cap=cap).index_select(0, self._repeats.one)

    def _through_kernel(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        assert self._kernel is not None
        if self._paths is None or self._paths.bounds.device != query.device:
            self._paths = Paths(self.tree, query.device)
        paths = self._paths
        key, value = paths.keys.take(key), paths.keys.take(value)
        bounds, longest = (paths.bounds, paths.key_bounds), (paths.longest, paths.longest_key)
        return self._kernel(query, key, value, bounds, longest, window)


class RepeatedAttention:
    """Attention among the tokens of a tree's documents, one document behind the other, for which the forward is
    computed by row: for gradients that each document must have for itself, through a shared beginning too."""

    def __init__(self, tree: PrefixTree, repeats: Repeats, kernel: Kernel | None = None) -> None:
        """repeats: `repeats_of(tree, device)`."""
        self._repeats = repeats
        self._longest = max(tree.documents)
        self._unshared = DocumentAttention(tree.documents, kernel)
        self._parts: tuple[Parts, Parts] | None = None
        if kernel is None and repeats.rows.device.type == "cpu":
            self._parts = parts_of(tree), documents_of(tree)

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [tokens, H, D], key and value [tokens, KV, D] -> [tokens, H, D]. Windows, caps and kernels attend in
        each document anew."""
        if self._parts is None or cap or 0 < window < self._longest or torch.is_autocast_enabled(query.device.type):
            return self._unshared(layer, query, key, value, window=window, cap=cap)
        out: Tensor = RepeatedProduct.apply(query, key, value, *self._parts, self._repeats)
        return out


def repeats_of(tree: PrefixTree, device: torch.device) -> Repeats:
    """The tree's tokens as repeats of its rows."""
    return Repeats(torch.from_numpy(tree.row_of_token).to(device), tree.num_rows)


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
        self.bounds = bounds_of(queries, device)
        self.key_bounds = bounds_of(keys, device)
        self.longest, self.longest_key = max(queries), max(keys)
