"""Keys and values of the engine's sequences, and attention over them.

Layout: per layer, blocks of BLOCK places (kv_blocks.py says who holds which). On a CPU a decode step attends block by
block, by a compiled function (async_rl_kernels.native) or, where there is no compiler, by torch's products: every block
is multiplied with the queries of all tokens whose sequence holds it, where it lies, and the parts of one token are
added up. So no key is copied, and a beginning that several sequences share is read once for all of them. Elsewhere the
blocks of a row are gathered first.

Shapes: rows are the sequences that a step feeds, tokens all tokens fed, packed row by row; places those of a block;
queries are the most tokens of one row, or of one block; length is the number of places that a row attends to; parts are
pairs of a block and a token that attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from async_rl.generator.kv_blocks import BLOCK, SCRATCH, BlockCopy, BlockTables, Ints, block_bytes
from async_rl.model.attention import DocumentAttention, capped_attention
from async_rl_kernels import native

FIRST_BLOCKS = 64
SEEN, MASKED = np.float32(0), np.float32(-1e30)
"""finite, so that a block of which a token sees nothing has a softmax, whose weight is then 0"""
LOG2_E = float(np.log2(np.e))
"""scores are exponents of 2: torch's exp takes ten times longer where its result underflows, exp2 does not"""
SMALL_APPEND = 8
"""tokens: longer appends never share the decode rows' attention calls"""
MANY = 32
"""tokens that attend to one block; blocks of fewer are padded to the most of them, to save attention calls"""
DENSE = 0.66
"""blocks are attended to where they lie, with those between them, when they are at least this share of all"""


class KVCache:
    """Storage of `max_blocks` blocks, [blocks, kv_heads, BLOCK, head_dim] for keys and for values. It grows on demand
    and starts as zeros: masked places must be finite."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shared_heads = heads // kv_heads
        """query heads of one key-value head"""
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.max_blocks = max_blocks
        self.device, self.dtype = device, dtype
        self.plain = device.type == "cpu" and dtype == torch.float32
        """few queries attend by plain products, block by block, which is faster than SDPA's CPU kernel"""
        self.compiled = native.library() if self.plain and head_dim in native.HEAD_SIZES else None
        """the functions by which they do and the cache is written; None: torch's operations"""
        self.blocks = 0
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []
        self.reserve(min(FIRST_BLOCKS, max_blocks))

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.layers, self.kv_heads, self.head_dim, self.dtype.itemsize)

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks; the contents stay."""
        if blocks <= self.blocks:
            return
        assert blocks <= self.max_blocks
        grown = min(self.max_blocks, max(blocks, 2 * self.blocks))
        for tensors in (self.key, self.value):
            for layer in range(self.layers):  # one after another: the old one is freed before the next is made
                store = self._zeros((grown, self.kv_heads, BLOCK, self.head_dim))
                if self.blocks:
                    store[: self.blocks] = tensors[layer]
                    tensors[layer] = store
                else:
                    tensors.append(store)
        self.blocks = grown

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        # Memory from numpy.zeros is taken as it is written.
        flat = np.zeros(prod(shape) * self.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(flat).view(self.dtype).view(shape)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out copies, in order."""
        for copy in copies:
            self.reserve(max(copy.source, copy.target) + 1)
            for store in (*self.key, *self.value):
                store[copy.target, :, : copy.tokens] = store[copy.source, :, : copy.tokens]

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks whose contents are not finite."""
        for store in [*self.key, *self.value]:
            store[list(blocks)] = 0

    def write(self, layer: int, where: Places, key: Tensor, value: Tensor) -> None:
        """key and value [tokens, kv_heads, head_dim] to `where`."""
        size = self.head_dim
        if self.compiled is not None:
            if key.stride() != value.stride() or key.stride()[1:] != (size, 1):
                key, value = key.contiguous(), value.contiguous()
            self.compiled.write_cache(
                key.data_ptr(), value.data_ptr(), key.stride(0), self.key[layer].data_ptr(),
                self.value[layer].data_ptr(), *where.addresses, len(key), self.kv_heads, size,
            )  # fmt: skip
            return
        self._write(layer, where.rows(self), key, value)

    def _write(self, layer: int, where: Tensor, key: Tensor, value: Tensor) -> None:  # where [tokens * kv_heads] int64
        size = self.head_dim
        for store, new in ((self.key, key), (self.value, value)):
            store[layer].view(-1, size).index_copy_(0, where, new.reshape(-1, size))

    def gather(self, layer: int, blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in `blocks` [rows * n]: [rows, kv_heads, n * BLOCK, head_dim] each."""
        key = self.key[layer].index_select(0, blocks)
        value = self.value[layer].index_select(0, blocks)
        shape = (rows, -1, self.kv_heads, BLOCK, self.head_dim)
        return (
            key.view(shape).transpose(1, 2).reshape(rows, self.kv_heads, -1, self.head_dim),
            value.view(shape).transpose(1, 2).reshape(rows, self.kv_heads, -1, self.head_dim),
        )


class Places:
    """Where a step's tokens are written: at `place` of `block`, both [tokens]."""

    def __init__(self, block: Ints, place: Ints) -> None:
        self._block, self._place = np.ascontiguousarray(block), np.ascontiguousarray(place)
        self.addresses = address(self._block), address(self._place)
        self._rows: Tensor | None = None

    def rows(self, cache: KVCache) -> Tensor:
        """Their rows in a store of [blocks * kv_heads * BLOCK, head_dim], [tokens * kv_heads] int64."""
        if self._rows is None:
            head = self._block[:, None] * cache.kv_heads + np.arange(cache.kv_heads)
            self._rows = torch.from_numpy((head * BLOCK + self._place[:, None]).ravel()).to(cache.device)
        return self._rows


def address(array: NDArray[Any]) -> int:
    """Of the first element of a contiguous array, for compiled functions."""
    found: int = array.__array_interface__["data"][0]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The tokens that one step feeds to the model, packed row by row: row i adds `count[i]` tokens to slot `slot[i]`,
    the first of them at position `start[i]`."""

    slot: Ints  # [rows]
    start: Ints  # [rows]
    count: Ints  # [rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """Attention to blocks that about equally many tokens attend to, in plain products. The parts that it makes are
    n * queries + query; those that stand for no token are not read."""

    blocks: Tensor | None  # [n] int64; None: those from `begin` on
    begin: int
    n: int
    queries: int
    owners: Tensor | None  # [n * queries] int64: tokens; None: token i attends to block i
    mask: Tensor  # [n * kv_heads, 1 or queries * shared heads, BLOCK]
    ahead: Ints  # [n, queries, BLOCK]: positions of places minus those of tokens
    windowed: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCall:
    """Attention of rows of consecutive packed tokens to a copy of their blocks."""

    first: int
    last: int
    """packed tokens first <= i < last"""
    blocks: Tensor  # [rows * n] int64
    rows: int
    queries: int
    """most tokens of a row"""
    scatter: Tensor | None  # [last - first] int64 into [rows * queries]; None: one token each row
    mask: Tensor  # [rows, 1, queries * shared heads, length]
    ahead: Ints  # [rows, queries * shared heads, length]: positions of places minus those of tokens
    windowed: dict[int, Tensor] = field(default_factory=dict)


class CacheAttention:
    """The `Attention` of one step: writes the fed keys and values into the cache and attends over it.

    There are three kinds of rows. *Near* rows (one token, or few) attend block by block. *Far* rows (many tokens)
    attend to a copy of their blocks. *Fresh* rows, which have nothing cached, attend among their own packed tokens.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: BlockTables,
        feed: Feed,
        where: Places,
        near: int,
        far: int,
        before: CacheAttention | None = None,
    ) -> None:
        """The first `near` rows of `feed` are near, the next `far` far, the others fresh. `where`: of all tokens.
        `before`: of the step before this one."""
        self._cache, self._tables, self._where = cache, tables, where
        rows = np.arange(len(feed.slot))
        ends = feed.count.cumsum()
        self.last = ends - 1  # [rows]
        if len(rows) == ends[-1]:  # one token each
            self.row, offset, self.position = rows, np.zeros_like(rows), feed.start
        else:
            self.row = np.repeat(rows, feed.count)  # [tokens]
            offset = np.arange(len(self.row)) - (ends - feed.count)[self.row]
            self.position = feed.start[self.row] + offset  # [tokens]
        self.slot = feed.slot[self.row]  # [tokens]
        self._near = int(ends[near - 1]) if near else 0
        self._block_calls: list[BlockCall] = []
        self._parts = self._begins = torch.empty(0)
        """numbers of the parts, near token by near token, and where each token's begin; int64"""
        self._single = self._in_order = False
        """every near token attends to one block, alone; and these blocks come in the order of the tokens"""
        self._decodes = near == len(rows) == len(self.row)
        self._changes = tables.changes
        self._arranged = False
        self._compiled: native.Attention | None = None
        if cache.compiled is not None and near:
            self._compiled = self._arguments()
        elif before is not None and self._follows(before):
            self._go_on(before)
        elif near:
            self._arrange_blocks()
        self._row_calls: list[RowCall] = []
        first = near
        for last in _pieces(feed, tables.length, near, near + far):
            self._row_calls.append(self._row_call(feed, offset, first, last))
            first = last
        fresh = feed.count[near + far :]
        self._fresh = DocumentAttention(fresh.tolist()) if len(fresh) else None

    @property
    def at_once(self) -> native.Attention | None:
        """The argument of the compiled function by which all tokens attend; None where some attend otherwise."""
        return self._compiled if self._near == len(self.row) else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int = 0, cap: float = 0.0
    ) -> Tensor:
        """query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim];
        `window` and `cap` as in `decoder.Attention`. What a window no longer reaches stays in the cache."""
        self._cache.write(layer, self._where, key, value)
        parts = []
        if self._near:
            parts.append(self._attend_blocks(layer, query[: self._near], window, cap))
        for call in self._row_calls:
            parts.append(self._attend_rows(call, layer, query[call.first : call.last], window, cap))
        if self._fresh is not None:
            begin = len(self.row) - self._fresh.num_tokens
            parts.append(self._fresh(layer, query[begin:], key[begin:], value[begin:], window=window, cap=cap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # ---------------------------------------------------------------- block by block

    def _follows(self, before: CacheAttention) -> bool:
        """Whether this step feeds a token more to each row of the one before, and no chain has changed."""
        return (
            self._decodes
            and before._decodes
            and before._arranged
            and self._changes == before._changes
            and np.array_equal(self.slot, before.slot)
            and np.array_equal(self.position, before.position + 1)
        )

    def _go_on(self, before: CacheAttention) -> None:
        """Attend as in the step before. Blocks that several tokens attend to are not written into."""
        self._arranged = True
        self._parts, self._begins = before._parts, before._begins
        self._single, self._in_order = before._single, before._in_order
        for call in before._block_calls:
            mask, ahead = call.mask, call.ahead - 1
            if call.queries == 1:
                blocks = slice(call.begin, call.begin + call.n) if call.blocks is None else call.blocks.numpy()
                mask = self._block_mask(self._hidden(ahead, blocks))
            self._block_calls.append(replace(call, mask=mask, ahead=ahead, windowed={}))

    def _hidden(self, ahead: Ints, blocks: Ints | slice) -> NDArray[np.bool_]:
        """[n, queries, BLOCK]: places that a token does not see, or that are not in use."""
        return (ahead > 0) | (np.arange(BLOCK) >= self._tables.filled[blocks][:, None])[:, None, :]

    def _arrange_blocks(self) -> None:
        """Put the blocks of the near tokens into calls, by the number of tokens that attend to them."""
        self._arranged = True
        tables, tokens = self._tables, self._near
        slot = self.slot[:tokens]
        columns = int(tables.length[slot].max())
        table = tables.table[slot, :columns]  # [tokens, columns]
        token, column = np.nonzero(np.arange(columns) < tables.length[slot, None])  # [parts] each, by token
        block = table[token, column]
        attending = np.bincount(block)[block]  # [parts]: tokens that attend to its block
        of_part = np.where(attending == 1, 0, 1 + attending // MANY)
        number = np.empty(len(block), dtype=np.int64)
        made = 0
        for some in np.unique(of_part):
            chosen = np.flatnonzero(of_part == some)
            call, numbers = self._block_call(block[chosen], token[chosen])
            number[chosen] = made + numbers
            made += call.n * call.queries
            self._block_calls.append(call)
        begins = np.searchsorted(token, np.arange(tokens))
        self._parts, self._begins = torch.from_numpy(number), torch.from_numpy(begins)
        one = len(self._block_calls) == 1 and self._block_calls[0].queries == 1 and len(block) == tokens
        self._single = one
        self._in_order = one and np.array_equal(number, np.arange(tokens)) and made == tokens

    def _block_call(self, block: Ints, token: Ints) -> tuple[BlockCall, Ints]:
        """(the call for parts of these blocks and tokens, their numbers in it), [parts] each."""
        cache, tables = self._cache, self._tables
        among, at = np.unique(block, return_inverse=True)
        spread = int(among[-1] - among[0]) + 1
        if len(among) >= DENSE * spread:
            at, n, begin, blocks = block - among[0], spread, int(among[0]), None
            among = np.arange(begin, begin + n)
        else:
            n, begin, blocks = len(among), 0, torch.from_numpy(among)
        order = np.argsort(at, kind="stable")
        held = np.bincount(at, minlength=n)
        queries = int(held.max())
        rank = np.empty(len(at), dtype=np.int64)
        rank[order] = np.arange(len(at)) - (held.cumsum() - held)[at[order]]
        owners = np.zeros((n, queries), dtype=np.int64)
        owners[at, rank] = token
        ahead = (tables.first[among, None] + np.arange(BLOCK))[:, None, :] - self.position[owners][:, :, None]
        hidden = self._hidden(ahead, among)
        plain = queries == 1 and n == self._near and np.array_equal(owners[:, 0], np.arange(n))
        call = BlockCall(
            blocks=blocks,
            begin=begin,
            n=n,
            queries=queries,
            owners=None if plain else torch.from_numpy(owners.ravel()),
            mask=self._block_mask(hidden),
            ahead=ahead,
        )
        assert cache.plain
        return call, at * queries + rank

    def _block_mask(self, hidden: NDArray[np.bool_]) -> Tensor:
        """hidden [n, queries, BLOCK] -> 0 or MASKED, [n * kv_heads, 1 or queries * shared heads, BLOCK]."""
        mask = np.where(hidden, MASKED, SEEN)
        if mask.shape[1] > 1:
            mask = np.repeat(mask, self._cache.shared_heads, 1)
        return torch.from_numpy(np.repeat(mask, self._cache.kv_heads, 0))

    def _attend_blocks(self, layer: int, query: Tensor, window: int, cap: float) -> Tensor:
        """query [near tokens, heads, head_dim] -> the same shape."""
        if self._compiled is not None and not cap:
            return self._attend_compiled(self._compiled, layer, query, window)
        if not self._arranged:
            self._arrange_blocks()
        tokens, heads, size = query.shape
        found = [self._scores(call, layer, query, window, cap) for call in self._block_calls]
        if self._single:
            weights = found[0].sub_(found[0].amax(-1, keepdim=True)).exp2_()
            out = torch.bmm(weights, self._values(self._block_calls[0], layer)).div_(weights.sum(-1, keepdim=True))
            out = out.view(-1, heads, size)
            return out if self._in_order else out.index_select(0, self._parts)
        peaks = [
            _by_part(scores.amax(-1, keepdim=True), call, self._cache.kv_heads)
            for scores, call in zip(found, self._block_calls, strict=True)
        ]
        peak = peaks[0] if len(peaks) == 1 else torch.cat(peaks)
        peak = F.embedding_bag(self._parts, peak, self._begins, mode="max")  # [tokens, heads]
        totals, sums = [], []
        for scores, call in zip(found, self._block_calls, strict=True):
            of_part = peak if call.owners is None else peak.index_select(0, call.owners)
            weights = scores.sub_(_by_block(of_part[..., None], call, self._cache.kv_heads)).exp2_()
            totals.append(_by_part(weights.sum(-1, keepdim=True), call, self._cache.kv_heads))
            sums.append(_by_part(torch.bmm(weights, self._values(call, layer)), call, self._cache.kv_heads))
        total = totals[0] if len(totals) == 1 else torch.cat(totals)
        out = sums[0] if len(sums) == 1 else torch.cat(sums)
        total = F.embedding_bag(self._parts, total, self._begins, mode="sum")  # [tokens, heads]
        out = F.embedding_bag(self._parts, out, self._begins, mode="sum")  # [tokens, heads * head_dim]
        return out.view(tokens, heads, size).div_(total[..., None])

    def _scores(self, call: BlockCall, layer: int, query: Tensor, window: int, cap: float) -> Tensor:
        """query [near tokens, heads, head_dim] -> masked scores times log2(e), [n * kv_heads, queries *
        shared heads, BLOCK]."""
        size = query.shape[-1]
        key = self._of(call, self._cache.key[layer]).mT  # [n * kv_heads, head_dim, BLOCK]
        if call.owners is not None:
            query = query.index_select(0, call.owners)
        query = _by_block(query, call, self._cache.kv_heads)
        mask = call.mask
        if window:
            if window not in call.windowed:
                beyond = call.ahead <= -window
                if beyond.any():
                    mask = torch.minimum(mask, self._block_mask(beyond))
                call.windowed[window] = mask
            mask = call.windowed[window]
        if not cap:
            return torch.baddbmm(mask, query, key, alpha=LOG2_E * size**-0.5)
        return torch.bmm(query, key).mul_(size**-0.5 / cap).tanh_().mul_(LOG2_E * cap).add_(mask)

    def _values(self, call: BlockCall, layer: int) -> Tensor:  # [n * kv_heads, BLOCK, head_dim]
        return self._of(call, self._cache.value[layer])

    @staticmethod
    def _of(call: BlockCall, store: Tensor) -> Tensor:
        """[blocks, kv_heads, ...] -> [n * kv_heads, ...] of a call's blocks."""
        chosen = store[call.begin : call.begin + call.n] if call.blocks is None else store.index_select(0, call.blocks)
        return chosen.flatten(0, 1)

    def _arguments(self) -> native.Attention:
        """What all layers of this step call the compiled function with."""
        tables, cache = self._tables, self._cache
        self.slot, self.position = np.ascontiguousarray(self.slot), np.ascontiguousarray(self.position)
        self._kept = self.slot[: self._near], self.position[: self._near]
        slot, position = map(address, self._kept)
        return native.Attention(
            table=address(tables.table),
            columns=tables.table.shape[1],
            length=address(tables.length),
            filled=address(tables.filled),
            first=address(tables.first),
            slot=slot,
            position=position,
            tokens=self._near,
            heads=cache.shared_heads * cache.kv_heads,
            kv_heads=cache.kv_heads,
            size=cache.head_dim,
            threads=torch.get_num_threads(),
            scale=cache.head_dim**-0.5,
        )

    def _attend_compiled(self, chosen: native.Attention, layer: int, query: Tensor, window: int) -> Tensor:
        cache = self._cache
        assert cache.compiled is not None
        if query.stride()[1:] != (cache.head_dim, 1):
            query = query.contiguous()
        out = query.new_empty(query.shape)
        chosen.query, chosen.stride, chosen.window = query.data_ptr(), query.stride(0), window
        chosen.keys, chosen.values = cache.key[layer].data_ptr(), cache.value[layer].data_ptr()
        chosen.out = out.data_ptr()
        cache.compiled.attend(chosen)
        return out

    # ---------------------------------------------------------------- row by row

    def _attend_rows(self, call: RowCall, layer: int, query: Tensor, window: int, cap: float) -> Tensor:
        """query [tokens of the call, heads, head_dim] -> the same shape. The query heads that share a key-value head
        are laid beside each other as if they were queries, so no key is repeated."""
        _, heads, size = query.shape
        n, kv = call.rows, self._cache.kv_heads
        key, value = self._cache.gather(layer, call.blocks, n)
        if call.scatter is not None:
            padded = query.new_zeros((n * call.queries, heads, size))
            query = padded.index_copy_(0, call.scatter, query)
        folded = query.view(n, call.queries, kv, heads // kv, size).transpose(1, 2).reshape(n, kv, -1, size)
        mask = call.mask
        if window:
            if window not in call.windowed:
                beyond = call.ahead <= -window
                if beyond.any():
                    mask = mask.masked_fill(torch.from_numpy(beyond).to(mask.device)[:, None], float(MASKED))
                call.windowed[window] = mask
            mask = call.windowed[window]
        if cap:
            out = capped_attention(folded, key, value, mask, cap)
        else:
            out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
        out = out.view(n, kv, call.queries, heads // kv, size).transpose(1, 2).reshape(-1, heads, size)
        return out if call.scatter is None else out.index_select(0, call.scatter)

    def _row_call(self, feed: Feed, offset: Ints, first: int, last: int) -> RowCall:
        """The attention call for rows first <= i < last of the feed; `offset` [tokens]: place of a token in its row."""
        tables, device, dtype = self._tables, self._cache.device, self._cache.dtype
        begin = int(self.last[first] - feed.count[first] + 1)
        end = int(self.last[last - 1]) + 1
        slots = feed.slot[first:last]
        rows, queries = len(slots), int(feed.count[first:last].max())
        columns = int(tables.length[slots].max())
        held = np.arange(columns) < tables.length[slots, None]
        blocks = np.where(held, tables.table[slots, :columns], SCRATCH)  # [rows, columns]
        filled = np.where(held, tables.filled[blocks], 0)
        # Unused queries stand at position 0, so that their softmax is finite.
        position = np.zeros((rows, queries), dtype=np.int64)  # of each query, in its sequence
        index = None
        if queries == 1:
            position[:, 0] = self.position[begin:end]
        else:
            at = self.row[begin:end] - first
            position[at, offset[begin:end]] = self.position[begin:end]
            index = torch.from_numpy(at * queries + offset[begin:end]).to(device)
        place = (tables.first[blocks][..., None] + np.arange(BLOCK)).reshape(rows, 1, -1)
        unused = (np.arange(BLOCK) >= filled[..., None]).reshape(rows, 1, -1)
        ahead = np.repeat(place - position[:, :, None], self._cache.shared_heads, 1)
        hidden = (ahead > 0) | unused
        mask = torch.from_numpy(np.where(hidden, MASKED, SEEN)).to(device, dtype)[:, None]
        return RowCall(
            first=begin,
            last=end,
            blocks=torch.from_numpy(blocks.ravel()).to(device),
            rows=rows,
            queries=queries,
            scatter=index,
            mask=mask,
            ahead=ahead,
        )


def _by_block(parts: Tensor, call: BlockCall, kv_heads: int) -> Tensor:
    """[n * queries, heads, size] -> [n * kv_heads, queries * shared heads, size]: the query heads that share a
    key-value head are laid beside each other as if they were queries, so no key is repeated."""
    size = parts.shape[-1]
    if call.queries == 1:
        return parts.reshape(call.n * kv_heads, -1, size)
    return parts.view(call.n, call.queries, kv_heads, -1, size).transpose(1, 2).reshape(call.n * kv_heads, -1, size)


def _by_part(values: Tensor, call: BlockCall, kv_heads: int) -> Tensor:
    """[n * kv_heads, queries * shared heads, size] -> [n * queries, heads * size]."""
    if call.queries == 1:
        return values.view(call.n, -1)
    split = values.view(call.n, kv_heads, call.queries, -1, values.shape[-1])
    return split.transpose(1, 2).reshape(call.n * call.queries, -1)


def arrange(feed: Feed, *, plain: bool, at_once: bool) -> tuple[Feed, Ints, int, int]:
    """(sorted feed, order of its rows, number of near rows, number of far rows). `at_once`: all are near."""
    if at_once:
        return feed, np.arange(len(feed.slot)), len(feed.slot), 0
    fresh = (feed.start == 0) & (feed.count > 1)
    near = ~fresh & (feed.count <= SMALL_APPEND) if plain else np.zeros(len(fresh), dtype=bool)
    if near.all():
        return feed, np.arange(len(near)), len(near), 0
    far = np.flatnonzero(~near & ~fresh)
    if len(far) > 1:
        far = far[np.lexsort((_magnitude((feed.start + feed.count)[far]), _magnitude(feed.count[far])))]
    order = np.concatenate((np.flatnonzero(near), far, np.flatnonzero(fresh)))
    sorted_feed = Feed(slot=feed.slot[order], start=feed.start[order], count=feed.count[order])
    return sorted_feed, order, int(near.sum()), len(far)


def _pieces(feed: Feed, length: Ints, first: int, last: int) -> list[int]:
    """Ends of the runs of far rows with similar count and chain; each run is padded to its longest row. `length`
    [slots]: blocks of each chain."""
    if first == last:
        return []
    kind = _magnitude(feed.count[first:last]) * 64 + _magnitude(length[feed.slot[first:last]])
    return [*(np.flatnonzero(np.diff(kind)) + first + 1).tolist(), last]


def _magnitude(values: Ints) -> Ints:
    """Number of binary digits of each value; same shape."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
