"""The text of a turn as it grows, against the text of the whole turn."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from support_agents import agents_tokenizer
from support_real_tokenizers import NAMES, ours

from async_rl.model.text_stream import UNFINISHED, TextStream
from async_rl.model.tokenizer import Tokenizer

TEXTS = ["It is 4 °C.", "終わり \U0001f600 don't  stop\n\n", " a \U0001f468\u200d\U0001f469", "x_1 = \\frac{1}{2}\t"]

pytestmark = pytest.mark.xdist_group("real tokenizers")


def grown(tokenizer: Tokenizer, tokens: list[int], random: Random) -> None:
    """`tokens` come one by one or several at once; what is given is always the begin of the whole text."""
    stream, whole, at = TextStream(tokenizer), tokenizer.decode(tokens, behind=True), 0
    while at < len(tokens):
        at += random.choice([1, 1, 1, 2, 5])
        text = stream.follow(tokens[:at])
        assert whole.startswith(text), (tokens, at)
        so_far = tokenizer.decode(tokens[:at], behind=True)
        assert so_far.endswith(UNFINISHED) or text == so_far
    assert whole.endswith(UNFINISHED) or stream.text == whole


@pytest.mark.parametrize("name", [*NAMES, "bytes"])
def test_a_turn_that_grows_is_decoded_as_the_whole_turn(name: str, tmp_path: Path) -> None:
    tokenizer = agents_tokenizer(tmp_path) if name == "bytes" else ours(name)
    random = Random(3)
    for text in TEXTS * 5:
        grown(tokenizer, tokenizer.encode(text, behind=True), random)
    for _ in range(150):
        tokens = random.choices(range(tokenizer.vocab_size), k=random.randrange(1, 30))
        grown(tokenizer, tokens, random)


def test_a_long_turn_is_not_decoded_anew_for_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = agents_tokenizer(tmp_path), []
    plain = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: (decoded.append(len(ids)), plain(ids, **how))[1])
    turn = tokenizer.encode("one letter is a token here, " * 40)
    stream = TextStream(tokenizer)
    for end in range(len(turn) + 1):
        stream.follow(turn[:end])
    assert stream.text == plain(turn)
    assert sum(decoded) <= 4 * len(turn)
