"""Attention among packed documents: the `Attention` that the trainer passes to the decoder.

Shapes: tokens are all tokens of the packed documents; longest is the number of tokens of the longest document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from async_rl.model.varlen import Kernel

MAX_PADDING = 1.25
"""a bucket may hold at most this many times its real tokens"""


class DocumentAttention:
    """Causal attention in which documents, packed end to end, do not attend to each other.

    Documents of similar length are padded together for SDPA; a `kernel` (model/varlen.py) takes them packed, in half
    precision.

    Example: `model(tokens, positions, DocumentAttention([5, 3]))` with eight tokens and positions 0..4, 0..2.
    """

    def __init__(self, lengths: Sequence[int], kernel: Kernel | None = None) -> None:
        if any(length < 1 for length in lengths):
            raise ValueError(f"every document needs at least one token, lengths are {list(lengths)}")
        self.lengths = [int(length) for length in lengths]
        self.num_tokens = sum(self.lengths)
        self._kernel = kernel
        self._buckets: list[PaddedDocuments] | None = None
        self._bounds: Tensor | None = None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim];
        `window` and `cap` as in `decoder.Attention`. No kernel caps scores in training: torch operations do."""
        if query.shape[0] != self.num_tokens:
            raise ValueError(f"{query.shape[0]} tokens for documents of {self.num_tokens} tokens")
        if self._kernel is not None and not cap and (dtype := half_precision(query)) is not None:
            bounds, longest = self._document_bounds(query.device), max(self.lengths)
            pairs = (bounds, bounds), (longest, longest)
            return self._kernel(query.to(dtype), key.to(dtype), value.to(dtype), *pairs, window)
        if len(self.lengths) == 1:
            return causal(query[None], key[None], value[None], window=window, cap=cap)[0]
        return self._padded(query, key, value, window, cap)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, window: int, cap: float) -> Tensor:
        if self._buckets is None or self._buckets[0].gather.device != query.device:
            self._buckets = make_buckets(self.lengths, query.device)
        parts = []
        for bucket in self._buckets:
            rows = bucket.gather
            out = causal(query[rows], key[rows], value[rows], window=window, cap=cap)
            parts.append(out.flatten(0, 1))  # [documents * longest, heads, head_dim]
        # one index puts the tokens of all buckets back in order and leaves the padding out
        every = parts[0] if len(parts) == 1 else torch.cat(parts)
        return every.index_select(0, self._buckets[0].restore)

    def _document_bounds(self, device: torch.device) -> Tensor:  # [documents + 1] int32
        if self._bounds is None or self._bounds.device != device:
            self._bounds = bounds_of(self.lengths, device)
        return self._bounds


def bounds_of(lengths: Sequence[int], device: torch.device) -> Tensor:  # [documents + 1] int32
    """Where each document begins among packed tokens, and where the last one ends: what a kernel asks for."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def half_precision(query: Tensor) -> torch.dtype | None:
    """The dtype in which a kernel computes `query` [tokens, heads, head_dim]: autocast's (rotated queries are float32
    there, and no kernel casts them itself), else the query's own; None when that is not float16 or bfloat16."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


class PaddedDocuments:
    """Documents of similar length, padded together.

    `gather` [documents, longest] int64 indexes packed tokens, where padding repeats a document's last token. `restore`
    [tokens] int64 indexes the padded tokens of all buckets in turn; all buckets of a call share it.
    """

    def __init__(self, gather: Tensor, restore: Tensor) -> None:
        self.gather = gather
        self.restore = restore


def make_buckets(lengths: Sequence[int], device: torch.device) -> list[PaddedDocuments]:
    """Sort documents by length, and start a new bucket where padding would exceed `MAX_PADDING`."""
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    filled = 0
    for document in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= MAX_PADDING * (filled + lengths[document]):
            groups[-1].append(document)
            filled += lengths[document]
        else:
            groups.append([document])
            filled = lengths[document]
    restore = torch.empty(sum(lengths), dtype=torch.int64)
    gathers, base = [], 0
    for group in groups:
        size = torch.tensor([lengths[i] for i in group])[:, None]
        column = torch.arange(lengths[group[0]])[None, :]
        gather = starts[group][:, None] + torch.minimum(column, size - 1)  # [documents, longest]
        real = column < size  # [documents, longest]
        where = base + torch.arange(gather.numel()).view(gather.shape)
        restore[gather[real]] = where[real]
        gathers.append(gather)
        base += gather.numel()
    on_device = restore.to(device)
    return [PaddedDocuments(gather.to(device), on_device) for gather in gathers]


def causal(query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0) -> Tensor:
    """Causal attention within each document: query [documents, longest, heads, head_dim], key and value with kv_heads,
    -> the query's shape. No real token attends to padding, which is at the end. `window`, `cap`: as in
    `decoder.Attention`."""
    longest, groups = query.shape[1], query.shape[2] // key.shape[2]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    seen: Tensor | None = None
    if cap or 0 < window < longest:
        ahead = torch.arange(longest, device=query.device)
        ahead = ahead[None, :] - ahead[:, None]  # [longest, longest]: a key's position less the query's
        seen = ahead <= 0
        if window:
            seen &= ahead > -window
    if cap:
        assert seen is not None
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(seen, -torch.inf)
        out = capped_attention(query, key, value, mask, cap)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=groups > 1
        )
    return out.transpose(1, 2)


def capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Attention whose scores s are cap * tanh(s / cap) + mask: query [..., queries, head_dim], key and value
    [..., keys, head_dim], mask [..., queries, keys] of 0 and -inf -> [..., queries, head_dim]."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = torch.tanh(scores / cap) * cap + mask
    return torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value
