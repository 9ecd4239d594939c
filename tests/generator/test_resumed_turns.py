"""Turns that go on from what their slots hold begin together before a step, as if one by one; and what an episode's
short ways leave out."""

from __future__ import annotations

import asyncio
import random
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.contexts import Context, first_tokens, lay_out
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.kv_blocks import BLOCK, BlockTables
from async_rl.generator.slots import FEW_RESUMED, CheckedRequest, Slots
from async_rl.model.attention import DocumentAttention
from async_rl.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def checked(session: int, tokens: list[int], known: int, draw: random.Random) -> CheckedRequest:
    params = SamplingParams(max_tokens=draw.choice([1, 5, 10**30]), temperature=draw.choice([0.0, 0.5, 1.0]))
    request = Request(session=session, tokens=tokens, params=params, seed=draw.randrange(-(2**63), 2**64))
    history = tokens[known:] if known else np.array(tokens, dtype=np.int32)
    return CheckedRequest(request=request, history=history, rule=draw.randrange(8), known=known)


@pytest.mark.parametrize("number", [1, FEW_RESUMED, FEW_RESUMED + 1, 17])
def test_turns_that_begin_together_begin_as_one_by_one(number):
    made = []
    for together in (False, True):
        draw = random.Random(number)
        slots = Slots(32, 64, BlockTables(slots=32, blocks=200, size=BLOCK))
        before = {}
        for session in draw.sample(range(100), number):
            slot = slots.take(session)
            before[session] = [draw.randrange(40) for _ in range(draw.randint(1, 20))]
            slots.start(slot, checked(session, before[session], 0, draw))
            slots.end(np.array([slot]))
        for session in draw.sample(sorted(before), number):
            tokens = [*before[session], *(draw.randrange(40) for _ in range(draw.choice([1, 1, 1, 2, 30])))]
            known = slots.goes_on(slots.of(session), tokens)
            assert known == len(before[session])
            one = checked(session, tokens, known, draw)
            (slots.resume if together else slots.start)(slots.of(session), one)
        slots.start_resumed()
        assert not slots.resumed
        assert not slots.forget_idle()  # all of them run
        made.append(slots)
    one_by_one, at_once = made
    for name in ("tokens", "known", "turn_start", "limit", "temperature", "seed", "rule", "arrival", "running"):
        assert np.array_equal(getattr(one_by_one, name), getattr(at_once, name)), name
    assert one_by_one.held == at_once.held


def test_a_turn_that_goes_on_can_be_given_up_before_its_first_step(tokenizer):
    config = qwen3_config()
    engine = EmbeddedEngine(make_decoder(config), tokenizer, max_sequences=8)
    model = make_decoder(config)

    def ask(session: int, tokens: list[int]) -> Request:
        return Request(session=session, tokens=tokens, params=SamplingParams(max_tokens=6), seed=70 + session)

    async def go() -> None:
        first = [[3, session, 9] for session in range(6)]
        done = await asyncio.gather(*(engine.generate(ask(session, tokens)) for session, tokens in enumerate(first)))
        histories = [[*tokens, *said.tokens, 7] for tokens, said in zip(first, done, strict=True)]
        again = [asyncio.create_task(engine.generate(ask(s, tokens))) for s, tokens in enumerate(histories)]
        await asyncio.sleep(0)  # they have asked, and no step was taken
        assert [list(engine.sampled(session)) for session in range(6)] == [[]] * 6
        assert engine.stats().running == 6
        engine.release(0)
        again[1].cancel()
        found = await asyncio.gather(*again, return_exceptions=True)
        assert found[0] == Completion(tokens=(), log_probs=(), versions=(), finish="aborted")
        assert isinstance(found[1], asyncio.CancelledError)
        for history, said in zip(histories[2:], found[2:], strict=True):
            assert isinstance(said, Completion)
            tokens = torch.tensor([*history, *said.tokens])
            with torch.no_grad():
                hidden = model(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)]))
                log_probs = torch.log_softmax(hidden @ model.head.T, -1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
            assert np.allclose(said.log_probs, log_probs[len(history) - 1 :].numpy(), atol=1e-5)
        assert engine.stats().running == 0
        fresh = await engine.generate(ask(0, histories[0]))  # nothing is left of the turn that was given up
        assert len(fresh.tokens) == 6
        await engine.close()

    asyncio.run(go())


def test_spans_of_versions_are_those_of_a_plain_definition():
    draw = random.Random(0)
    for number in range(300):
        versions = [draw.choice([-1, -1, 4] if number % 2 else [-1, 4, 4, 5]) for _ in range(draw.randint(0, 9))]
        context = Context(number=0, key=0, seed=0, tokens=[1] * len(versions))
        context.log_probs, context.versions = [0.0] * len(versions), versions
        sampled = [(place, version) for place, version in enumerate(versions) if version >= 0]
        expected = []
        for version, run in groupby(sampled, key=lambda one: one[1]):
            places = [place for place, _ in run]
            expected.append((version, places[0], places[-1] + 1))
        assert [(span.version, span.start, span.end) for span in lay_out([context]).versions] == expected


def test_two_tokenizers_write_the_same_prompt_each_in_its_own_way(tmp_path: Path):
    one, other = (Tokenizer(write_folder(tmp_path / name, qwen3_config())) for name in "ab")
    other.encode = lambda text, **_: [len(text)]  # type: ignore[method-assign]
    assert list(first_tokens(one, "12")) == one.encode("12", first=True)
    assert list(first_tokens(other, "12")) == [2]
