"""Whether two models number their tokens alike."""

from __future__ import annotations

from pathlib import Path

from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer


def check_vocabulary(where: str, folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a teacher whose tokens have other numbers: it would be asked about other texts. `where`: the setting.
    Raises UserError."""
    own, other = tokenizer.vocabulary, Tokenizer(folder).vocabulary
    if own == other:
        return
    differing = sorted(set(own.items()) ^ set(other.items()), key=lambda pair: (pair[1], pair[0]))
    number = differing[0][1]
    here = next((token for token, i in own.items() if i == number), "nothing")
    there = next((token for token, i in other.items() if i == number), "nothing")
    raise UserError(
        f"{where} is {folder}, whose tokenizer is another one than the model's: token {number} is {there!r} there and "
        f"{here!r} here. A teacher must have the model's tokenizer"
    )
