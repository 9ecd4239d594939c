"""The text of a turn, token by token, as it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from async_rl.model.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""what bytes of a character decode to before its last one is there"""


@dataclass(slots=True)
class TextStream:
    """Decodes a growing turn: each token once or twice, not the whole turn anew.

    Source: the two offsets of vLLM's and TGI's incremental detokenisation. Tokens are decoded behind those of the piece
    before, so that what a decoder does between two tokens is done here, too.
    """

    tokenizer: Tokenizer
    text: str = ""
    """whole characters only"""
    tokens: list[int] = field(default_factory=list)
    """that were seen, end tokens left out"""
    seen: int = 0
    """tokens, end tokens included"""
    begin: int = 0
    """in `tokens`: of the piece before"""
    end: int = 0
    """in `tokens`: behind the last one whose text is in `text`"""

    def follow(self, turn: Sequence[int]) -> str:
        """The text of `turn`, which begins with the tokens given before; a character that is not complete is left
        out."""
        new = [int(token) for token in turn[self.seen :] if int(token) not in self.tokenizer.end_ids]
        self.seen = max(self.seen, len(turn))
        if new:
            self.tokens += new
            before = self.tokenizer.decode(self.tokens[self.begin : self.end], behind=True)
            now = self.tokenizer.decode(self.tokens[self.begin :], behind=True)
            if len(now) > len(before) and not now.endswith(UNFINISHED):
                self.text += now[len(before) :]
                self.begin, self.end = self.end, len(self.tokens)
        return self.text
