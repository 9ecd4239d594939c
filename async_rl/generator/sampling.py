"""Sampling of one token a row, and the decision which turns end with it.

Tokens are drawn by inverse CDF with one uniform each. The uniform is a function of (seed, position) alone, so neither
the batch that a token shares, nor the order in which requests came, nor an interruption changes what is sampled.
`StopRules` decides for all rows at once, by table look-up, which turns are over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from async_rl.generator.engine import SamplingParams
from async_rl.model.tokenizer import Tokenizer
from async_rl.trajectory.noise import uniforms
from async_rl_kernels import native

__all__ = ["StopRules", "inverse_cdf", "sample", "uniforms"]

BLOCK = 1024
"""tokens of a block in the two-level search of large vocabularies"""


def sample(logits: Tensor, temperature: NDArray[np.float32], uniform: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Sample a token of each row.

    Args:
        logits: [rows, vocabulary], any float dtype; overwritten.
        temperature: [rows] float32; 0 takes the likeliest token and gives its log-prob at temperature 1.
        uniform: [rows] float64 in [0, 1).

    Returns:
        tokens [rows] int64, and their log-probs [rows] float32 under the distribution sampled from.
    """
    if logits.shape[1] <= 4 * BLOCK and logits.is_contiguous() and native.usable(logits):
        return _drawn(logits, temperature, uniform)
    logits = logits.float()
    greedy = temperature == 0
    if (temperature != 1).any():
        divisor = torch.from_numpy(np.where(greedy, 1, temperature).astype(np.float32))
        logits = logits.div_(divisor.to(logits.device)[:, None])
    likeliest = logits.argmax(-1) if greedy.any() else None
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # [rows, vocabulary]
    tokens, total = _search(weights, torch.from_numpy(uniform).to(logits.device))
    if likeliest is not None:
        tokens = torch.where(torch.from_numpy(greedy).to(logits.device), likeliest, tokens)
    weight = weights.gather(1, tokens[:, None]).squeeze(1)
    return tokens, (weight.double().log_() - total.log()).float()


def _drawn(
    logits: Tensor, temperature: NDArray[np.float32], uniform: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:  # as `sample`
    """`sample` of a small vocabulary by a compiled function."""
    library = native.library()
    assert library is not None
    rows, vocabulary = logits.shape
    temperature, uniform = np.ascontiguousarray(temperature), np.ascontiguousarray(uniform)
    assert temperature.dtype == np.float32
    assert uniform.dtype == np.float64
    tokens, log_probs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    library.draw(
        logits.data_ptr(), temperature.ctypes.data, uniform.ctypes.data, tokens.data_ptr(), log_probs.data_ptr(), rows,
        vocabulary,
    )  # fmt: skip
    return tokens, log_probs


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index of each row whose cumulative weight exceeds `uniform` times the row's total.

    `weights` [rows, vocabulary] float32 need not sum to 1; `uniform` [rows] float64. Returns [rows] int64; no token of
    weight 0 is returned."""
    return _search(weights, uniform)[0]


def _search(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(`inverse_cdf`, the rows' totals [rows] float64). Sums are in float64; large vocabularies are searched in two
    levels, where those within a block are in float32, except the one block a row that is searched."""
    rows, vocabulary = weights.shape
    if vocabulary <= 4 * BLOCK:
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1]
        return _exceeding(cumulative, uniform * total), total
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # [rows, blocks]
    target = uniform * ends[:, -1]  # [rows]
    block = _exceeding(ends, target)  # [rows]
    row = torch.arange(rows, device=weights.device)
    before = torch.where(block > 0, ends[row, (block - 1).clamp_min(0)], 0.0)
    inside = blocks[row, block].cumsum(-1, dtype=torch.float64)  # [rows, BLOCK]
    # Both sums are rounded differently: the target must not lie beyond the block.
    last = torch.nextafter(inside[:, -1], torch.zeros_like(target))
    return block * BLOCK + _exceeding(inside, torch.minimum(target - before, last)), ends[:, -1]


def _exceeding(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [rows] of the first element of `cumulative` [rows, n] above `target` [rows], which is below the last one.
    The clamp acts on NaN only, whose log-prob the caller refuses."""
    found = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return found.clamp_max(cumulative.shape[1] - 1)


MAX_RULES = 64
"""rules kept; each costs two bytes a token of the vocabulary"""

RuleKey = tuple[tuple[int, ...], tuple[str, ...]]
"""(stop tokens, stop strings)"""


class StopRules:
    """The stop tokens and strings of requests, compiled to rows of two tables [rules, vocabulary]: `ends` (this token
    ends the turn) and `maybe` (this token may complete a stop string: the text that a task reads decides)."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._text: list[str] | None = None
        self._index: dict[RuleKey, int] = {}
        self._last: tuple[RuleKey | None, int] = None, -1
        self._strings: list[tuple[str, ...]] = []
        self.ends = np.zeros((MAX_RULES, vocabulary), dtype=bool)
        self.maybe = np.zeros((MAX_RULES, vocabulary), dtype=bool)

    def number(self, params: SamplingParams, in_use: Callable[[], Collection[int]]) -> int:
        """The number of a request's rule, compiled on first use. `in_use()` gives the rules of unfinished requests,
        which are not overwritten. Raises ValueError for a stop token outside the vocabulary."""
        key = params.stop_tokens, params.stop_strings
        if key == self._last[0]:  # its tuples are the same ones, usually: no hash to be computed
            return self._last[1]
        found = self._index.get(key)
        if found is None:
            if len(self._strings) < MAX_RULES:
                found = len(self._strings)
                self._strings.append(())
            else:
                found = self._replaceable(in_use())
            self._compile(found, params)
            self._index[key] = found
        self._last = key, found
        return found

    def ended(
        self,
        rule: NDArray[np.int64],
        token: NDArray[np.int64],
        slot: NDArray[np.int64],
        turn_of: Callable[[int], NDArray[np.int32]],
    ) -> NDArray[np.bool_]:
        """Which rows end with their last token: [rows] bool. `rule`, `token` and `slot` are [rows]; `turn_of(slot)`
        gives the tokens of a turn."""
        ends = self.ends[rule, token]
        for row in np.flatnonzero(self.maybe[rule, token] & ~ends):
            strings = self._strings[rule[row]]
            # A character takes at most four tokens (one a byte).
            tail = turn_of(int(slot[row]))[-4 * max(map(len, strings)) - 4 :].tolist()
            text = self._tokenizer.decode(tail, behind=True)
            ends[row] = any(string in text for string in strings)
        return ends

    def _replaceable(self, busy: Collection[int]) -> int:
        """The oldest rule that no request uses. Raises ValueError when all are in use."""
        for key, number in self._index.items():  # oldest first
            if number not in busy:
                del self._index[key]
                return number
        raise ValueError(f"more than {MAX_RULES} different stop rules run at once")

    def _compile(self, number: int, params: SamplingParams) -> None:
        ends, maybe = self.ends[number], self.maybe[number]
        ends[:] = False
        maybe[:] = False
        ends[[token for token in self._tokenizer.end_ids if token < self._vocabulary]] = True
        for token in params.stop_tokens:
            if not 0 <= token < self._vocabulary:
                raise ValueError(f"stop token {token} is outside the vocabulary of {self._vocabulary}")
            ends[token] = True
        strings = tuple(string for string in params.stop_strings if string)
        for string in strings:
            maybe |= self._may_complete(string[-1])
        self._strings[number] = strings

    def _may_complete(self, last: str) -> NDArray[np.bool_]:
        """[vocabulary] bool: tokens with which a string that ends in `last` may end. A decoder may strip a space, and a
        character beyond ASCII may be spread over tokens of single bytes: then any token may."""
        if last == " " or not last.isascii():
            return np.ones(self._vocabulary, dtype=bool)
        return np.array([last in text for text in self._texts()])

    def _texts(self) -> list[str]:
        """The text of each token of the vocabulary."""
        if self._text is None:
            known = min(self._tokenizer.vocab_size, self._vocabulary)
            self._text = [self._tokenizer.decode([token], special=True, behind=True) for token in range(known)]
            self._text += [""] * (self._vocabulary - known)
        return self._text
