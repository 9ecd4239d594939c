"""When a turn ends, decided for all rows at once by table look-up."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from async_rl.generator.engine import SamplingParams
from async_rl.model.tokenizer import Tokenizer

MAX_RULES = 64
"""rules kept; one costs two bytes a token of the vocabulary"""

Key = tuple[tuple[int, ...], tuple[str, ...]]


class StopRules:
    """The stop tokens and strings of requests, compiled to rows of two tables over the vocabulary:
    `ends` (this token ends the turn) and `maybe` (look at the text: a stop string may end here)."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._text: list[str] | None = None
        self._index: dict[Key, int] = {}
        self._strings: list[tuple[str, ...]] = []
        self._ends = np.zeros((MAX_RULES, vocabulary), dtype=bool)
        self._maybe = np.zeros((MAX_RULES, vocabulary), dtype=bool)

    def number(self, params: SamplingParams, in_use: Callable[[], Collection[int]]) -> int:
        """The rule of a request, compiled on first use. `in_use()` are the rules of unfinished requests,
        which are not overwritten. Raises ValueError for a stop token outside the vocabulary."""
        key = (params.stop_tokens, params.stop_strings)
        found = self._index.get(key)
        if found is None:
            if len(self._strings) < MAX_RULES:
                found = len(self._strings)
                self._strings.append(())
            else:
                found = self._replaceable(in_use())
            self._compile(found, params)
            self._index[key] = found
        return found

    def ended(
        self,
        rule: NDArray[np.int64],
        token: NDArray[np.int64],
        slot: NDArray[np.int64],
        turn_of: Callable[[int], NDArray[np.int32]],
    ) -> NDArray[np.bool_]:
        """Which rows end with `token`, their last. All [rows]; `turn_of(slot)` are the tokens of a turn."""
        ends = self._ends[rule, token]
        for row in np.flatnonzero(self._maybe[rule, token] & ~ends):
            strings = self._strings[rule[row]]
            # A character takes at most four tokens (one a byte).
            tail = turn_of(int(slot[row]))[-4 * max(map(len, strings)) - 4 :].tolist()
            # With special tokens, which a stop string may name, and without, as a task sees the text.
            texts = [self._tokenizer.decode(tail, special=special) for special in (True, False)]
            ends[row] = any(string in text for string in strings for text in texts)
        return ends

    def _replaceable(self, busy: Collection[int]) -> int:
        for key, number in self._index.items():  # oldest first
            if number not in busy:
                del self._index[key]
                return number
        raise ValueError(f"more than {MAX_RULES} different stop rules run at once")

    def _compile(self, number: int, params: SamplingParams) -> None:
        ends, maybe = self._ends[number], self._maybe[number]
        ends[:] = False
        maybe[:] = False
        for token in (*params.stop_tokens, self._tokenizer.eos_id):
            if not 0 <= token < self._vocabulary:
                raise ValueError(f"stop token {token} is outside the vocabulary of {self._vocabulary}")
            ends[token] = True
        strings = tuple(string for string in params.stop_strings if string)
        for string in strings:
            ends |= np.array([string in text for text in self._texts()])
            if len(string) > 1 or not string.isascii() or string == " ":
                maybe |= self._may_complete(string[-1])
        self._strings[number] = strings

    def _may_complete(self, last: str) -> NDArray[np.bool_]:
        """Tokens after which a string ending in `last` may stand. A space can be hidden by a decoder
        that strips it; a character beyond ASCII can be spread over tokens of single bytes."""
        if last == " " or not last.isascii():
            return np.ones(self._vocabulary, dtype=bool)
        return np.array([last in text for text in self._texts()])

    def _texts(self) -> list[str]:
        if self._text is None:
            known = self._tokenizer.vocab_size
            self._text = [self._tokenizer.decode([token], special=True) for token in range(known)]
            self._text += [""] * (self._vocabulary - known)
        return self._text
