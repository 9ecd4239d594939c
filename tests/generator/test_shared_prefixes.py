"""Sequences that begin alike share the cache; nothing sampled is changed by it, nor by a cache that is too small."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_engine import run
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.kv_blocks import BLOCK, block_bytes, blocks_for, cache_blocks
from async_rl.model.tokenizer import Tokenizer

TOLERANCE = 1e-5
CONFIG = qwen3_config(max_context=256)
BLOCK_BYTES = block_bytes(CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG)


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 40, length).tolist()


def ask(session: int, tokens: Sequence[int], max_tokens: int = 12) -> Request:
    return Request(session=session, tokens=tokens, params=SamplingParams(max_tokens=max_tokens), seed=1000 + session)


def groups(count: int, size: int, length: int, max_tokens: int = 12) -> list[Request]:
    """Groups of requests with one prompt each, one after another."""
    return [ask(g * size + i, prompt(g, length + g), max_tokens) for g in range(count) for i in range(size)]


def make_engine(tokenizer: Tokenizer, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(make_decoder(CONFIG), tokenizer, **options)


def alone(tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Completion]:
    """Each request by itself in an engine that held nothing before."""
    return [run(make_engine(tokenizer), [request])[0] for request in requests]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for some, other in zip(found, expected, strict=True):
        assert list(some.tokens) == list(other.tokens)
        assert np.allclose(some.log_probs, other.log_probs, atol=TOLERANCE)
        assert some.finish == other.finish


@pytest.mark.parametrize("length", [16, BLOCK, 45, 3 * BLOCK])
@pytest.mark.parametrize("prefill_tokens", [2048, 20])
def test_a_groups_prompt_is_fed_once_and_every_sample_is_that_of_a_request_alone(tokenizer, length, prefill_tokens):
    requests = groups(3, 8, length)
    engine = make_engine(tokenizer, prefill_tokens=prefill_tokens)
    assert_same(run(engine, requests), alone(tokenizer, requests))
    once = sum(length + g for g in range(3))
    assert engine.stats().tokens_prefilled <= once


def test_samples_are_those_of_transformers_own_forward(folder, tokenizer):
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = EmbeddedEngine(make_decoder(CONFIG), tokenizer)
    asyncio.run(engine.load({name: p.detach() for name, p in model.named_parameters()}, 1))
    requests = groups(2, 4, 45)
    for request, done in zip(requests, run(engine, requests), strict=True):
        ids = torch.tensor([[*request.tokens, *done.tokens]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0], -1)[len(request.tokens) - 1 : -1]
        expected = log_probs.gather(1, ids[0, len(request.tokens) :, None]).squeeze(1)
        assert np.allclose(done.log_probs, expected.numpy(), atol=TOLERANCE)


def test_prompts_that_only_begin_alike_share_their_beginning(tokenizer):
    system = prompt(99, 70)
    requests = [ask(i, [*system, *prompt(i, 5 + i)]) for i in range(6)]
    engine = make_engine(tokenizer)
    assert_same(run(engine, requests), alone(tokenizer, requests))
    assert engine.stats().tokens_prefilled < 0.6 * sum(len(request.tokens) for request in requests)


def test_what_groups_of_one_step_begin_with_is_fed_once_also_after_an_update(tokenizer):
    """27 of 45 tokens: as a chat template puts before every question, and no multiple of a block."""
    system = prompt(99, 27)
    requests = [ask(4 * g + i, [*system, g + 3, *prompt(g, 17)], 24) for g in range(3) for i in range(4)]
    weights = {name: p.detach() for name, p in make_decoder(CONFIG).named_parameters()}
    engine = make_engine(tokenizer)
    fed = []

    async def go() -> list[Completion]:
        done = [asyncio.create_task(engine.generate(request)) for request in requests]
        while engine.stats().tokens_generated < 24:
            await asyncio.sleep(0)
        fed.append(engine.stats().tokens_prefilled)
        again = sum(len(engine.sampled(request.session)) for request in requests)
        await engine.load(weights, 1)
        while engine.stats().tokens_prefilled == fed[0]:
            await asyncio.sleep(0)
        fed.append(engine.stats().tokens_prefilled - fed[0] - again)
        await engine.close()
        return [await each for each in done]

    found = asyncio.run(go())
    assert fed[0] == 27 + 3 * 18
    assert fed[1] <= 27 + 3 * 18
    expected = alone(tokenizer, requests)
    for some, other in zip(found, expected, strict=True):
        assert len(some.tokens) > 2
        assert list(some.tokens) == list(other.tokens[: len(some.tokens)])
        assert np.allclose(some.log_probs, other.log_probs[: len(some.tokens)], atol=TOLERANCE)


def test_a_prompt_that_is_in_the_cache_is_found_by_a_later_request(tokenizer):
    engine = make_engine(tokenizer)
    first, second, branch = ask(0, prompt(1, 45), 60), ask(1, prompt(1, 45)), None

    async def go() -> list[Completion]:
        nonlocal branch
        long = asyncio.create_task(engine.generate(first))
        while engine.stats().tokens_generated < 5:
            await asyncio.sleep(0)
        fed = engine.stats().tokens_prefilled
        done = await engine.generate(second)
        assert engine.stats().tokens_prefilled == fed + 45 - BLOCK  # the first goes on in the block of the rest
        both = [await long, done]
        branch = ask(2, [*first.tokens, *both[0].tokens[:20], 7, 8])  # goes on from the middle of the other's turn
        both.append(await engine.generate(branch))
        await engine.close()
        return both

    done = asyncio.run(go())
    assert len(done[0].tokens) > 22
    assert branch is not None
    assert_same(done, alone(tokenizer, [first, second, branch]))


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_a_prompt_cached_under_older_weights_is_not_shared(tokenizer, kv):
    engine = make_engine(tokenizer, kv_on_update=kv)
    new = {name: p.detach() for name, p in make_decoder(CONFIG, 1).named_parameters()}
    later = [ask(i, prompt(1, 45)) for i in range(1, 5)]

    async def go() -> list[Completion]:
        long = asyncio.create_task(engine.generate(ask(0, prompt(1, 45), 100)))
        while engine.stats().tokens_generated < 5:
            await asyncio.sleep(0)
        await engine.load(new, 1)
        done = await asyncio.gather(*(engine.generate(request) for request in later))
        engine.release(0)
        assert (await long).versions[-1] == 1
        await engine.close()
        return done

    done = asyncio.run(go())
    fresh = [EmbeddedEngine(make_decoder(CONFIG, 1), tokenizer) for _ in later]
    assert_same(done, [run(engine, [request])[0] for engine, request in zip(fresh, later, strict=True)])


@pytest.mark.parametrize("blocks", [9, 12, 20])
def test_a_cache_that_is_too_small_delays_and_changes_nothing(tokenizer, blocks):
    """256 tokens are 8 blocks, and one is never used: 9 hold one sequence, and 16 sequences want them."""
    requests = [*groups(2, 4, 45, 40), *(ask(100 + i, prompt(50 + i, 3 + 9 * i), 40) for i in range(8))]
    engine = make_engine(tokenizer, cache_bytes=blocks * BLOCK_BYTES)
    assert_same(run(engine, requests), alone(tokenizer, requests))
    assert engine.stats().cache_bytes <= blocks * BLOCK_BYTES


def test_episodes_in_a_small_cache_lose_their_turns_cache_and_nothing_else(tokenizer):
    async def episode(engine: EmbeddedEngine, session: int) -> list[Completion]:
        history, record = prompt(session % 3, 30), []
        for turn in range(4):
            done = await engine.generate(ask(session, history, 10))
            record.append(done)
            history = [*history, *done.tokens, *prompt(100 * session + turn, 1 + session % 12)]
        engine.release(session)
        return record

    async def play(engine: EmbeddedEngine) -> list[list[Completion]]:
        records = await asyncio.gather(*(episode(engine, session) for session in range(9)))
        await engine.close()
        return records

    plenty = asyncio.run(play(make_engine(tokenizer)))
    engine = make_engine(tokenizer, cache_bytes=10 * BLOCK_BYTES)
    scarce = asyncio.run(play(engine))
    for wide, narrow in zip(plenty, scarce, strict=True):
        assert_same(narrow, wide)


def test_the_cache_is_bounded_whatever_the_context_and_one_sequence_always_fits():
    assert cache_blocks(BLOCK_BYTES, 10_000, 256, 1 << 20) == (1 << 20) // BLOCK_BYTES
    assert cache_blocks(BLOCK_BYTES, 4, 256, 1 << 30) == blocks_for(256, BLOCK, 4)
    assert cache_blocks(BLOCK_BYTES, 4, 256, 1) == blocks_for(256, BLOCK)
    assert cache_blocks(BLOCK_BYTES, 10**6, 256) * BLOCK_BYTES <= 2 << 30


def test_a_released_leader_leaves_its_followers_alone(tokenizer):
    requests = groups(1, 3, 60, 30)
    engine = make_engine(tokenizer, prefill_tokens=20)

    async def go() -> list[Completion]:
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        while engine.stats().tokens_prefilled < 20:  # the first is in the middle of its prompt
            await asyncio.sleep(0)
        engine.release(0)
        done = await asyncio.gather(*tasks)
        await engine.close()
        return done

    done = asyncio.run(go())
    assert done[0].finish == "aborted"
    assert_same(done[1:], alone(tokenizer, requests[1:]))
