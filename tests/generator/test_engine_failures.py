"""An engine that fails: who is told, at once, and who is not concerned."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch
from support_models import llama_config, make_decoder, write_folder

from async_rl.errors import RunFailed
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, LogitsNotFinite, Request, SamplingParams
from async_rl.model.decoder import Decoder
from async_rl.model.tokenizer import Tokenizer

POISON = 30
"""a token that the model cannot read"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", llama_config()))


def make_model(value: float | None = None) -> Decoder:
    """`value`: of the embedding of POISON."""
    model = make_decoder(llama_config(), 0)  # untied: the head stays finite
    if value is not None:
        with torch.no_grad():
            model.model.embed_tokens.weight[POISON] = value
    return model


def make_engine(tokenizer: Tokenizer, value: float | None = None, *, max_sequences: int = 4) -> EmbeddedEngine:
    return EmbeddedEngine(make_model(value), tokenizer, max_sequences=max_sequences)


def ask(session: int, tokens: list[int], max_tokens: int = 12, temperature: float = 1.0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    return Request(session=session, tokens=tokens, params=params, seed=session)


def prompt(session: int) -> list[int]:
    return [token % 20 for token in range(session, session + 3 + session % 5)]


Answers = list[Completion | BaseException]


def all_at_once(engine: EmbeddedEngine, requests: list[Request]) -> Answers:
    async def run() -> Answers:
        found = await asyncio.gather(*(engine.generate(request) for request in requests), return_exceptions=True)
        for request in requests:
            engine.release(request.session)
        assert engine.stats().running == engine.stats().waiting == 0
        await engine.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_sequence_without_finite_logits_fails_alone_and_leaves_nothing_behind(
    tokenizer: Tokenizer, value: float, temperature: float
) -> None:
    good = [ask(i, prompt(i), temperature=temperature) for i in range(0, 40, 2)]
    bad = [ask(i, [*prompt(i), POISON, 1], temperature=temperature) for i in range(1, 40, 2)]
    mixed = [request for pair in zip(good, bad, strict=True) for request in pair]
    alone = all_at_once(make_engine(tokenizer), good)
    found = all_at_once(make_engine(tokenizer, value), mixed)  # more requests than slots: slots are used again
    sampled_poison = 0
    for before, after in zip(alone, found[::2], strict=True):
        assert isinstance(before, Completion)
        if POISON in before.tokens[:-1]:  # it poisons itself
            sampled_poison += 1
            assert isinstance(after, LogitsNotFinite)
        else:
            assert isinstance(after, Completion)
            assert after.tokens == before.tokens
            assert np.allclose(after.log_probs, before.log_probs, atol=1e-5)
    assert sampled_poison < len(good)
    for error in found[1::2]:
        assert isinstance(error, LogitsNotFinite)
        assert str(error) == "the model's logits are not finite under weights of version 0"


@pytest.mark.parametrize("count", [1, 3])
def test_a_sequence_that_fails_leaves_the_beginning_that_others_share_with_it(tokenizer: Tokenizer, count: int) -> None:
    shared = [token % 20 for token in range(40)]
    good = [ask(i, [*shared, i], 5) for i in range(count)]
    bad = [ask(100 + i, [*shared, POISON, i], 5) for i in range(2)]
    again = [ask(200, [*shared, 7], 5)]  # finds the beginning in the cache
    expected = all_at_once(make_engine(tokenizer, max_sequences=8), [*good, *again])
    assert not any(POISON in one.tokens for one in expected if isinstance(one, Completion))
    engine = make_engine(tokenizer, float("nan"), max_sequences=8)

    async def run() -> Answers:
        first = [asyncio.create_task(engine.generate(request)) for request in good]
        while engine.stats().tokens_generated < count:
            await asyncio.sleep(0)
        failed = await asyncio.gather(*map(engine.generate, bad), return_exceptions=True)
        assert all(isinstance(error, LogitsNotFinite) for error in failed)
        found: Answers = list(await asyncio.gather(*first, *map(engine.generate, again)))
        await engine.close()
        return found

    for some, other in zip(asyncio.run(run()), expected, strict=True):
        assert isinstance(some, Completion)
        assert isinstance(other, Completion)
        assert some.tokens == other.tokens
        assert np.allclose(some.log_probs, other.log_probs, atol=1e-5)


def broken_step() -> None:
    raise IndexError("an error of the engine")


def test_an_error_of_the_engine_reaches_everybody_who_waits_and_who_asks_later(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tokenizer, max_sequences=2)

    async def run() -> Answers:
        waiting = [asyncio.create_task(engine.generate(ask(i, prompt(i), 50))) for i in range(5)]
        while engine.stats().tokens_generated < 3:
            await asyncio.sleep(0)
        monkeypatch.setattr(engine, "_step", broken_step)
        found: Answers = list(await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5.0))
        for session in range(5):
            engine.release(session)  # no KeyError over the cause
        with pytest.raises(RunFailed, match="IndexError: an error of the engine"):
            await engine.generate(ask(9, prompt(9)))
        assert engine.stats().running == 0
        await engine.close()
        return found

    for error in asyncio.run(run()):
        assert isinstance(error, RunFailed)
        assert str(error) == "the engine failed: IndexError: an error of the engine"


def test_an_engine_whose_asyncio_task_is_cancelled_by_others_says_so(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer)

    async def run() -> None:
        waiting = asyncio.create_task(engine.generate(ask(0, prompt(0), 100)))
        while not engine.stats().running:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), waiting}:
            task.cancel()
        with pytest.raises(RunFailed, match="cancelled by other code"):
            await asyncio.wait_for(waiting, 5.0)
        engine.release(0)
        await engine.close()

    asyncio.run(run())


def test_sampling_depends_on_no_random_state_of_the_process(tokenizer: Tokenizer) -> None:
    def sampled(seed: int) -> list[list[int]]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = all_at_once(make_engine(tokenizer), [ask(i, prompt(i)) for i in range(6)])
        return [list(one.tokens) for one in found if isinstance(one, Completion)]

    assert sampled(0) == sampled(1)
    assert len(sampled(2)) == 6
