"""Contexts of one episode in the embedded engine: each is a sequence of its own, under one session of the task."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from support_contexts import judge, meet
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.model.tokenizer import Tokenizer

CONFIG = qwen3_config()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG))


@pytest.mark.parametrize("slots", [16, 3])
def test_an_episode_of_several_contexts_is_what_the_trainer_computes(tokenizer: Tokenizer, slots: int) -> None:
    """With 3 slots contexts lose their cache to others again and again."""

    async def play() -> None:
        model = make_decoder(CONFIG, 3)
        engine = EmbeddedEngine(make_decoder(CONFIG, 3), tokenizer, max_sequences=slots, max_context=64)
        judge(await meet(engine, tokenizer, number=8, max_context=64), model, 1e-4)
        await engine.close()

    asyncio.run(play())


@pytest.mark.parametrize("other", [[9, 8, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [3, 1, 4, 1, 5], [3]])
def test_a_session_may_come_with_another_history(tokenizer: Tokenizer, other: list[int]) -> None:
    """Shorter, longer, or one that parts from the cached one in its middle: the answer is that of a fresh session."""

    def ask(session: int, tokens: list[int], temperature: float = 1.0) -> Request:
        params = SamplingParams(max_tokens=6, temperature=temperature)
        return Request(session=session, tokens=tokens, params=params, seed=11)

    async def play() -> tuple[Completion, Completion]:
        engine = EmbeddedEngine(make_decoder(CONFIG, 3), tokenizer, max_sequences=4, max_context=64)
        await engine.generate(ask(1, [3, 1, 4, 1, 5, 9, 2, 6]))
        again = await engine.generate(ask(1, other, 0.6))
        fresh = await engine.generate(ask(2, other, 0.6))
        await engine.close()
        return again, fresh

    again, fresh = asyncio.run(play())
    assert list(again.tokens) == list(fresh.tokens)
    assert np.allclose(again.log_probs, fresh.log_probs, atol=1e-5)
