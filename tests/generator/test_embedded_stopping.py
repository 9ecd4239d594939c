"""When a turn ends: stop tokens, end of text, stop strings, limits."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import tokenizers
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.sampling import MAX_RULES, StopRules
from async_rl.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer, whose tokens hold several characters or part of one."""
    folder = tmp_path_factory.mktemp("bpe")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the answer is</answer> the end.\n\nso it is</answer>\n"] * 20, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return Tokenizer(folder)


def end_of(tokenizer: Tokenizer, ids: list[int], *strings: str, tokens: tuple[int, ...] = ()) -> int | None:
    """Index of the token at which a turn of `ids` would end."""
    rules = StopRules(tokenizer, tokenizer.vocab_size + 3)
    rule = rules.number(SamplingParams(max_tokens=1, stop_strings=strings, stop_tokens=tokens), set)
    for i, token in enumerate(ids):
        so_far = np.array(ids[: i + 1], dtype=np.int32)
        if rules.ended(np.array([rule]), np.array([token]), np.array([0]), lambda _slot, t=so_far: t)[0]:
            return i
    return None


def test_a_stop_string_ends_the_turn_where_it_is_complete(subwords):
    text = "it is</answer> and more"
    ids = subwords.encode(text)
    at = end_of(subwords, ids, "</answer>")
    assert at is not None
    assert "</answer>" in subwords.decode(ids[: at + 1])
    assert "</answer>" not in subwords.decode(ids[:at])


def test_a_stop_string_that_is_one_character_is_found_inside_longer_tokens(subwords):
    ids = subwords.encode("the end.\n\nso")
    at = end_of(subwords, ids, "\n")
    assert at is not None
    assert "\n" in subwords.decode(ids[at : at + 1])
    assert "\n" not in subwords.decode(ids[:at])


def test_a_stop_string_of_several_bytes_a_character_is_found(subwords):
    ids = subwords.encode("the 終わり so")
    at = end_of(subwords, ids, "わり")
    assert at is not None
    assert subwords.decode(ids[: at + 1]).endswith("わり")


def test_a_text_without_a_stop_string_goes_on(subwords):
    assert end_of(subwords, subwords.encode("the answer is </answe r>"), "</answer>") is None


def test_end_of_text_always_ends_and_stop_tokens_end_when_asked(tokenizer):
    ids = [1, 2, 3, tokenizer.eos_id]
    assert end_of(tokenizer, ids) == 3
    assert end_of(tokenizer, ids, tokens=(2,)) == 1
    assert end_of(tokenizer, tokenizer.encode("12<4"), "<", "2") == 1


def test_rules_are_compiled_once_and_replaced_when_there_are_too_many(tokenizer):
    rules = StopRules(tokenizer, tokenizer.vocab_size)
    params = [SamplingParams(max_tokens=1, stop_strings=(f"{i}x",)) for i in range(MAX_RULES + 5)]
    numbers = [rules.number(p, lambda: {0, 1}) for p in params]
    assert rules.number(params[0], set) == numbers[0]  # in use: not replaced
    assert numbers[MAX_RULES] == 2
    slots, turn = np.array([0]), np.array(tokenizer.encode("64x"), dtype=np.int32)
    assert rules.ended(np.array([2]), turn[-1:].astype(np.int64), slots, lambda _slot: turn)[0]


def sampled(tokenizer: Tokenizer, max_tokens: int, history: int = 3, **params: tuple) -> Completion:
    engine = EmbeddedEngine(make_decoder(qwen3_config()), tokenizer, max_context=38)

    async def go() -> Completion:
        done = await engine.generate(
            Request(
                session=0,
                tokens=[5] * history,
                params=SamplingParams(max_tokens=max_tokens, **params),
                seed=4,
            )
        )
        await engine.close()
        return done

    return asyncio.run(go())


def test_the_engine_stops_at_tokens_strings_and_limits(tokenizer):
    free = list(sampled(tokenizer, 20).tokens)
    assert len(free) == 20
    text = tokenizer.decode(free)
    by_token = sampled(tokenizer, 20, stop_tokens=(free[7],))
    assert by_token.finish == "stop"
    assert list(by_token.tokens) == free[: free.index(free[7]) + 1]
    by_string = sampled(tokenizer, 20, stop_strings=(text[9:11],))
    assert by_string.finish == "stop"
    first = next(n for n in range(21) if text[9:11] in tokenizer.decode(free[:n]))
    assert list(by_string.tokens) == free[:first]
    assert sampled(tokenizer, 20).finish == "length"


def test_a_full_context_ends_the_turn(tokenizer):
    done = sampled(tokenizer, 100, history=33)
    assert len(done.tokens) == 5
    assert done.finish == "length"
    none_left = sampled(tokenizer, 100, history=38)
    assert list(none_left.tokens) == []
    assert none_left.finish == "length"
