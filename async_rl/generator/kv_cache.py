"""Keys and values of the engine's sequences, and attention over them.

Layout: per layer [slots, kv_heads, capacity, head_dim]. A sequence lives in one slot; running sequences keep to the
low slots, so a decode step attends over a *view* of the cache and copies nothing. Capacity and slots double when
needed, up to the engine's limits.

Shapes: rows are the sequences that a step feeds, tokens all tokens fed, packed row by row; queries are the most tokens
that one row of an attention call adds; length is the number of cache positions that the call attends to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from async_rl.model.attention import DocumentAttention, capped_attention

Ints = NDArray[np.int64]
FIRST_CAPACITY, FIRST_SLOTS = 64, 16
STRIDE = 16
"""attention lengths are multiples of this: torch's CPU softmax is ten times slower on others"""
SEEN, MASKED = np.float32(0), np.float32(-np.inf)
SMALL_APPEND = 8
"""tokens: longer appends never share the decode rows' attention call"""
GATHER_COST = 4
"""copying a cached position costs about this many times attending to it"""
CALL_COST = 1200
"""one more attention call costs about as much as attending to this many positions"""


class KVCache:
    """Storage [2, layers, slots, kv_heads, capacity, head_dim] that grows on demand. It is zeroed when allocated:
    masked positions must be finite."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_slots: int,
        max_context: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shared_heads = heads // kv_heads
        """query heads of one key-value head"""
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.max_slots, self.max_context = max_slots, rounded_up(max_context)
        self.device, self.dtype = device, dtype
        self.plain = device.type == "cpu" and dtype == torch.float32
        """near rows use two batched products, a quarter faster than SDPA's CPU kernel when queries are few"""
        self.slots = self.capacity = 0
        self._store = torch.empty(0)
        self._allocate(min(FIRST_SLOTS, max_slots), min(FIRST_CAPACITY, self.max_context))

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for `slots` sequences of `tokens` tokens; the contents stay."""
        assert slots <= self.max_slots
        assert tokens <= self.max_context
        if slots > self.slots or tokens > self.capacity:
            grown_slots = self.slots if slots <= self.slots else min(self.max_slots, max(slots, 2 * self.slots))
            grown = self.capacity
            if tokens > grown:
                grown = min(self.max_context, max(rounded_up(tokens), 2 * grown))
            self._allocate(grown_slots, grown)

    def clear(self, slot: int) -> None:
        """Zero a slot whose contents are not finite."""
        self._store[:, :, slot] = 0

    def swap(self, first: list[int], second: list[int], tokens: int) -> None:
        """Exchange the first `tokens` positions of slots `first[i]` and `second[i]`."""
        here = torch.tensor(first + second, device=self.device)
        there = torch.tensor(second + first, device=self.device)
        part = self._store[..., :tokens, :]  # [2, layers, slots, kv_heads, tokens, head_dim]
        part[:, :, here] = part[:, :, there]

    def _allocate(self, slots: int, capacity: int) -> None:
        shape = (2, self.layers, slots, self.kv_heads, capacity, self.head_dim)
        store = torch.zeros(shape, device=self.device, dtype=self.dtype)
        if self.slots:
            store[:, :, : self.slots, :, : self.capacity] = self._store
        self._store = store
        self.slots, self.capacity = slots, capacity
        self.key = [store[0, layer] for layer in range(self.layers)]
        self.value = [store[1, layer] for layer in range(self.layers)]
        self.flat_key = [tensor.view(-1, self.head_dim) for tensor in self.key]
        self.flat_value = [tensor.view(-1, self.head_dim) for tensor in self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The tokens that one step feeds to the model, packed row by row: row i adds `count[i]` tokens to slot `slot[i]`,
    whose first `start[i]` positions are cached."""

    slot: Ints  # [rows]
    start: Ints  # [rows]
    count: Ints  # [rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One attention call over the cache, for rows of consecutive packed tokens."""

    first: int
    last: int
    """packed tokens first <= i < last"""
    rows: Tensor | None  # [padded rows] int64 slots; None: the view of slots 0..num_rows
    num_rows: int
    queries: int
    """most tokens a row adds"""
    scatter: Tensor | None  # [last - first] int64 into [num_rows * queries]; None: one token each row
    mask: Tensor
    """0 or -inf, [num_rows, 1 or queries * shared heads, length]; for plain attention the rows are repeated for each
    key-value head"""
    position: Ints
    """of every row of the mask in its sequence, the mask's shape without length"""
    windowed: dict[int, Tensor] = field(default_factory=dict)
    """window -> mask, of layers that do not attend to everything"""

    def mask_for(self, window: int) -> Tensor:
        """The mask of a layer that attends to `window` tokens back, itself among them; 0: to all."""
        if not window or int(self.position.max()) < window:
            return self.mask
        if window not in self.windowed:
            out_of_sight = np.arange(self.mask.shape[-1]) <= self.position[:, :, None] - window
            self.windowed[window] = self.mask.masked_fill(
                torch.from_numpy(out_of_sight).to(self.mask.device), float(MASKED)
            )
        return self.windowed[window]


class CacheAttention:
    """The `Attention` of one step: writes the fed keys and values into the cache and attends over it.

    There are three kinds of rows. *Near* rows (one token, or few) attend over a view of the low slots. *Far* rows
    (many tokens, or much longer than the rest) attend over a copy of their cache. *Fresh* rows, which have nothing
    cached, attend among their own packed tokens.
    """

    def __init__(self, cache: KVCache, feed: Feed, num_near: int, num_far: int) -> None:
        """The first `num_near` rows of `feed` are near, the next `num_far` far, the others fresh."""
        self._cache = cache
        device = cache.device
        rows = np.arange(len(feed.slot))
        ends = feed.count.cumsum()
        self.last = ends - 1  # [rows]
        if len(rows) == ends[-1]:  # one token each
            self.row, offset, self.position, self.slot = rows, np.zeros_like(rows), feed.start, feed.slot
        else:
            self.row = np.repeat(rows, feed.count)  # [tokens]
            offset = np.arange(len(self.row)) - (ends - feed.count)[self.row]
            self.position = feed.start[self.row] + offset  # [tokens]
            self.slot = feed.slot[self.row]  # [tokens]
        head = self.slot[:, None] * cache.kv_heads + np.arange(cache.kv_heads)
        self._where = torch.from_numpy((head * cache.capacity + self.position[:, None]).ravel()).to(device)
        self._calls: list[AttentionCall] = []
        if num_near:
            self._calls.append(self._call(feed, offset, 0, num_near, near=True))
        first = num_near
        for last in _pieces(feed, num_near, num_near + num_far):
            self._calls.append(self._call(feed, offset, first, last, near=False))
            first = last
        fresh = feed.count[num_near + num_far :]
        self._fresh = DocumentAttention(fresh.tolist()) if len(fresh) else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim];
        `window` and `cap` as in `decoder.Attention`. What a window no longer reaches stays in the cache."""
        cache = self._cache
        cache.flat_key[layer].index_copy_(0, self._where, key.reshape(-1, cache.head_dim))
        cache.flat_value[layer].index_copy_(0, self._where, value.reshape(-1, cache.head_dim))
        parts = [self._attend(call, layer, query[call.first : call.last], window, cap) for call in self._calls]
        if self._fresh is not None:
            begin = len(self.row) - self._fresh.num_tokens
            parts.append(self._fresh(layer, query[begin:], key[begin:], value[begin:], window=window, cap=cap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, call: AttentionCall, layer: int, query: Tensor, window: int, cap: float) -> Tensor:
        """query [tokens of the call, heads, head_dim] -> the same shape. The query heads that share a key-value head
        are laid beside each other as if they were queries, so no key is repeated."""
        _, heads, size = query.shape
        n, kv = call.num_rows, self._cache.kv_heads
        key, value = self._cache.key[layer], self._cache.value[layer]
        if call.scatter is not None:
            padded = query.new_zeros((n * call.queries, heads, size))
            query = padded.index_copy_(0, call.scatter, query)
        folded = query.view(n, call.queries, kv, heads // kv, size).transpose(1, 2)
        folded = folded.reshape(n * kv, -1, size)  # [num_rows * kv_heads, queries * shared heads, head_dim]
        mask = call.mask_for(window)
        if call.rows is None and self._cache.plain:
            out = _plain_attention(folded, key[:n].flatten(0, 1), value[:n].flatten(0, 1), mask, cap)
        else:
            length = mask.shape[-1]
            key, value = key[:, :, :length], value[:, :, :length]
            if call.rows is None:
                key, value = key[:n], value[:n]
            else:
                key, value = key.index_select(0, call.rows), value.index_select(0, call.rows)  # a copy
            folded, mask = folded.view(n, kv, -1, size), mask.view(n, -1, *mask.shape[1:])
            if cap:
                out = capped_attention(folded, key, value, mask, cap)
            else:
                out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
        out = out.view(n, kv, call.queries, heads // kv, size).transpose(1, 2).reshape(-1, heads, size)
        return out if call.scatter is None else out.index_select(0, call.scatter)

    def _call(self, feed: Feed, offset: Ints, first: int, last: int, *, near: bool) -> AttentionCall:
        """The attention call for rows first <= i < last of the feed; `offset` [tokens]: place of a token in its row."""
        device, dtype = self._cache.device, self._cache.dtype
        begin = int(self.last[first] - feed.count[first] + 1)
        end = int(self.last[last - 1]) + 1
        slots = feed.slot[first:last]
        queries = int(feed.count[first:last].max())
        length = rounded_up(int((feed.start[first:last] + feed.count[first:last]).max()))
        num_rows = int(slots[-1]) + 1 if near else last - first
        dense = queries == 1 and num_rows == last - first
        # Unused rows of the view attend to position 0, so that their softmax is finite.
        position = np.zeros((num_rows, queries), dtype=np.int64)  # of each query, in its sequence
        index = None
        if dense:
            position[:, 0] = self.position[begin:end]
        else:
            at = self.slot[begin:end] if near else self.row[begin:end] - first
            position[at, offset[begin:end]] = self.position[begin:end]
            index = torch.from_numpy(at * queries + offset[begin:end]).to(device)
        if near and self._cache.plain:
            position = np.repeat(position, self._cache.kv_heads, 0)
        if queries > 1:
            position = np.repeat(position, self._cache.shared_heads, 1)
        hidden = np.arange(length) > position[:, :, None]  # [rows, queries, length]
        mask = torch.from_numpy(np.where(hidden, MASKED, SEEN)).to(device, dtype)
        return AttentionCall(
            first=begin,
            last=end,
            rows=None if near else torch.from_numpy(slots).to(device),
            num_rows=num_rows,
            queries=queries,
            scatter=index,
            mask=mask,
            position=position,
        )


def rounded_up(length: int) -> int:
    """`length` to the next multiple of STRIDE."""
    return -(-length // STRIDE) * STRIDE


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, cap: float) -> Tensor:
    """query [rows, queries, head_dim] over the first `length` positions of key and value [rows, capacity, head_dim],
    with mask [rows, 1 or queries, length] -> [rows, queries, head_dim]."""
    length = mask.shape[-1]
    if cap:
        return capped_attention(query, key[:, :length], value[:, :length], mask, cap)
    scores = torch.baddbmm(mask, query, key[:, :length].transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1), value[:, :length])


def arrange(feed: Feed) -> tuple[Feed, int, int]:
    """(sorted feed, number of near rows, number of far rows): sort the rows, which come by ascending slot, into near,
    far and fresh ones, by estimated cost."""
    length = feed.start + feed.count
    several = feed.count > 1
    if not several.any() and length.max() < 2 * length.min():
        return feed, len(length), 0
    near = ~several
    small = several & (feed.count <= SMALL_APPEND)
    if small.any() and _worth_sharing(feed, length, near, small):
        near = near | small
    near = _without_outliers(feed, length, near)
    fresh = ~near & several & (feed.start == 0)
    far = np.flatnonzero(~near & ~fresh)
    if len(far) > 1:
        far = far[np.lexsort((_magnitude(length[far]), _magnitude(feed.count[far])))]
    order = np.concatenate((np.flatnonzero(near), far, np.flatnonzero(fresh)))
    sorted_feed = Feed(slot=feed.slot[order], start=feed.start[order], count=feed.count[order])
    return sorted_feed, int(near.sum()), len(far)


def _worth_sharing(feed: Feed, length: Ints, near: NDArray[np.bool_], small: NDArray[np.bool_]) -> bool:
    """Whether small appends should share the near call, which pads every row to the widest append. Masks [rows]."""
    if not near.any():
        return True
    widest = int(feed.count[small].max())
    both = near | small
    padding = (widest - 1) * (int(feed.slot[both].max()) + 1) * int(length[both].max())
    apart = int(length[small].sum()) * (GATHER_COST + widest) + CALL_COST
    return padding <= apart


def _without_outliers(feed: Feed, length: Ints, near: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`near` [rows] without the longest rows, when attention of all others over that length costs more than a copy of
    the longest rows' cache."""
    rows = np.flatnonzero(near)
    if len(rows) < 2:
        return near
    rows = rows[np.argsort(-length[rows], kind="stable")]
    longest = length[rows]
    if longest[0] < 2 * longest[-1]:
        return near
    viewed = int(feed.slot[rows].max()) + 1
    taken_out = np.concatenate(([0], longest.cumsum()[:-1]))  # tokens of the rows before this one
    cost = viewed * longest + GATHER_COST * taken_out + CALL_COST * (taken_out > 0)
    near = near.copy()
    near[rows[: int(cost.argmin())]] = False
    return near


def _pieces(feed: Feed, first: int, last: int) -> list[int]:
    """Ends of the runs of far rows with similar count and length; each run is padded to its longest row."""
    if first == last:
        return []
    kind = _magnitude(feed.count[first:last]) * 64 + _magnitude((feed.start + feed.count)[first:last])
    return [*(np.flatnonzero(np.diff(kind)) + first + 1).tolist(), last]


def _magnitude(values: Ints) -> Ints:
    """Number of binary digits of each value; same shape."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
