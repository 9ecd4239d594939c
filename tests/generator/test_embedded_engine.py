"""The embedded engine against clean forward passes of the trainer's attention."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_engine import run
from support_models import llama_config, make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.tokenizer import Tokenizer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def clean_log_probs(model: Decoder, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of tokens[1:], by the trainer's forward."""
    ids = torch.tensor(list(tokens))
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), DocumentAttention([len(ids)]))
        log_probs = torch.log_softmax(hidden @ model.head.T / temperature, -1)
    return log_probs[:-1].gather(1, ids[1:, None]).squeeze(1)


def assert_clean(model: Decoder, history: Sequence[int], done: Completion, temperature: float = 1.0) -> None:
    expected = clean_log_probs(model, [*history, *done.tokens], temperature)[len(history) - 1 :]
    assert np.allclose(done.log_probs, expected.numpy(), atol=TOLERANCE)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 40, length).tolist()


def ask(session: int, tokens: Sequence[int], max_tokens: int = 12, **params: Any) -> Request:
    return Request(
        session=session,
        tokens=tokens,
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=1000 + session,
    )


def make_engine(tokenizer: Tokenizer, seed: int = 0, config: Any = None, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(make_decoder(config or qwen3_config(), seed), tokenizer, **options)


@pytest.mark.parametrize("config", [qwen3_config(), llama_config()], ids=["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_trainers_forward(tokenizer, config, temperature):
    engine = make_engine(tokenizer, config=config, max_sequences=16)
    requests = [ask(i, prompt(i, 1 + 5 * i), 3 + 2 * i, temperature=temperature) for i in range(12)]
    for request, done in zip(requests, run(engine, requests), strict=True):
        assert done.finish in ("stop", "length")
        assert set(done.versions) == {0}
        assert_clean(make_decoder(config), request.tokens, done, temperature or 1.0)


def test_greedy_takes_the_likeliest_token(tokenizer):
    model = make_decoder(qwen3_config())
    (done,) = run(make_engine(tokenizer), [ask(0, prompt(0, 5), 8, temperature=0.0)])
    tokens = torch.tensor(prompt(0, 5) + list(done.tokens))
    with torch.no_grad():
        logits = model(tokens, torch.arange(len(tokens)), DocumentAttention([len(tokens)])) @ model.head.T
    assert logits.argmax(-1)[4:-1].tolist() == list(done.tokens)


def test_neither_batch_nor_order_nor_prefill_budget_changes_what_is_sampled(tokenizer):
    requests = [ask(i, prompt(i, 2 + (7 * i) % 23), 4 + i % 9) for i in range(20)]
    alone = [run(make_engine(tokenizer), [request])[0] for request in requests]
    for order, options in (
        (list(range(20)), {"max_sequences": 32}),
        (list(range(20))[::-1], {"max_sequences": 3}),
        (np.random.default_rng(0).permutation(20).tolist(), {"max_sequences": 20, "prefill_tokens": 5}),
    ):
        together = run(make_engine(tokenizer, **options), [requests[i] for i in order])
        for i, done in zip(order, together, strict=True):
            assert list(done.tokens) == list(alone[i].tokens)
            assert np.allclose(done.log_probs, alone[i].log_probs, atol=TOLERANCE)


async def episode(
    engine: EmbeddedEngine, session: int, turns: int, appended: int
) -> list[tuple[list[int], Completion]]:
    """Several turns with environment text between them."""
    history, record = prompt(session, 3 + session % 4), []
    for turn in range(turns):
        done = await engine.generate(ask(session, history, 2 + (session + turn) % 4))
        record.append((history, done))
        history = history + list(done.tokens) + prompt(100 * session + turn, appended + session % 3)
        for _ in range((session + turn) % 3):  # some environments take longer
            await asyncio.sleep(0)
    return record


def run_episodes(engine: EmbeddedEngine, sessions: int, turns: int = 4, appended: int = 1) -> list[Any]:
    async def go() -> list[Any]:
        records = await asyncio.gather(*(episode(engine, s, turns, appended) for s in range(sessions)))
        await engine.close()
        return records

    return asyncio.run(go())


@pytest.mark.parametrize("appended", [1, 12])
def test_turns_with_kept_cache_equal_a_fresh_prefill(tokenizer, appended):
    engine = make_engine(tokenizer, max_sequences=16)
    model = make_decoder(qwen3_config())
    records = run_episodes(engine, 10, appended=appended)
    for record in records:
        for history, done in record:
            assert_clean(model, history, done)
    fed_if_nothing_were_kept = sum(len(history) for record in records for history, _ in record)
    assert engine.stats().tokens_prefilled < 0.8 * fed_if_nothing_were_kept


def test_idle_sessions_are_evicted_when_places_are_short_and_still_right(tokenizer):
    model = make_decoder(qwen3_config())
    plenty = run_episodes(make_engine(tokenizer, max_sequences=16), 9)
    engine = make_engine(tokenizer, max_sequences=2)
    scarce = run_episodes(engine, 9)
    for wide, narrow in zip(plenty, scarce, strict=True):
        assert [list(done.tokens) for _, done in wide] == [list(done.tokens) for _, done in narrow]
        for history, done in narrow:
            assert_clean(model, history, done)


def test_a_changed_history_is_fed_again_from_where_it_differs(tokenizer):
    engine = make_engine(tokenizer)

    async def go() -> Completion:
        await engine.generate(ask(1, prompt(1, 20)))
        other = prompt(1, 10) + prompt(2, 10)
        done = await engine.generate(ask(1, other))
        assert_clean(make_decoder(qwen3_config()), other, done)
        await engine.close()
        return done

    asyncio.run(go())


def test_rows_of_very_different_length_are_right_together(tokenizer):
    requests = [ask(i, prompt(i, 100 if i % 5 == 0 else 2), 20) for i in range(15)]
    model = make_decoder(qwen3_config())
    for request, done in zip(requests, run(make_engine(tokenizer), requests), strict=True):
        assert_clean(model, request.tokens, done)


def test_long_rows_are_kept_apart_from_short_ones_when_that_is_cheaper(tokenizer):
    config = qwen3_config(max_context=2048)
    requests = [ask(i, prompt(i, 1900 if i == 3 else 2), 6, stop_tokens=()) for i in range(12)]
    model = make_decoder(config)
    engine = make_engine(tokenizer, config=config, prefill_tokens=700)
    for request, done in zip(requests, run(engine, requests), strict=True):
        assert_clean(model, request.tokens, done)


def test_requests_beyond_capacity_wait_in_order(tokenizer):
    engine = make_engine(tokenizer, max_sequences=2)
    finished: list[int] = []

    async def one(session: int) -> None:
        await engine.generate(ask(session, prompt(session, 4), 1))
        finished.append(session)
        engine.release(session)

    async def go() -> None:
        await asyncio.gather(*(one(session) for session in range(8)))
        await engine.close()

    asyncio.run(go())
    assert finished == list(range(8))


def test_a_short_turn_does_not_wait_for_a_long_one(tokenizer):
    engine = make_engine(tokenizer)

    async def go() -> None:
        long = asyncio.create_task(engine.generate(ask(0, prompt(0, 3), 100, temperature=1.0)))
        for session in range(1, 6):
            await engine.generate(ask(session, prompt(session, 3), 2))
        assert not long.done()
        engine.release(0)
        assert (await long).finish == "aborted"
        await engine.close()

    asyncio.run(go())


def test_probe_gives_the_log_probs_of_a_clean_forward(tokenizer):
    engine = make_engine(tokenizer)
    tokens = prompt(7, 30)
    found = asyncio.run(engine.probe(tokens))
    assert np.allclose(found, clean_log_probs(make_decoder(qwen3_config()), tokens).numpy(), atol=TOLERANCE)
    assert asyncio.run(engine.probe([3])) == []


def test_close_answers_everyone_with_aborted_and_the_tokens_so_far(tokenizer):
    engine = make_engine(tokenizer, max_sequences=2)

    async def go() -> list[Completion]:
        tasks = [asyncio.create_task(engine.generate(ask(i, prompt(i, 3), 100))) for i in range(4)]
        while engine.stats().tokens_generated < 10:
            await asyncio.sleep(0)
        assert engine.stats().running == 2
        assert engine.stats().waiting == 2
        await engine.close()
        after = await engine.generate(ask(9, prompt(9, 3)))
        return [*(await asyncio.gather(*tasks)), after]

    done = asyncio.run(go())
    assert [completion.finish for completion in done] == ["aborted"] * 5
    for session in (0, 1):
        assert len(done[session].tokens) >= 5
        assert_clean(make_decoder(qwen3_config()), prompt(session, 3), done[session])
    assert [len(completion.tokens) for completion in done[2:]] == [0, 0, 0]


def test_the_tokens_of_a_running_turn_can_be_seen(tokenizer):
    engine = make_engine(tokenizer, max_sequences=2)

    async def look() -> None:
        running = [asyncio.create_task(engine.generate(ask(i, prompt(i, 4), 9 + i))) for i in range(3)]
        seen: list[list[list[int]]] = [[], [], []]
        while not all(one.done() for one in running):
            await asyncio.sleep(0)
            for i in range(3):
                seen[i].append(list(engine.sampled(i)))
        for i, one in enumerate(running):
            whole = list(one.result().tokens)
            assert all(found == whole[: len(found)] for found in seen[i])
            assert {len(found) for found in seen[i]} >= set(range(1, len(whole)))
            assert not engine.sampled(i)
        await engine.close()

    asyncio.run(look())


def test_a_cancelled_request_frees_its_place(tokenizer):
    engine = make_engine(tokenizer, max_sequences=1)

    async def go() -> None:
        task = asyncio.create_task(engine.generate(ask(0, prompt(0, 3), 100)))
        while engine.stats().tokens_generated < 3:
            await asyncio.sleep(0)
        task.cancel()
        done = await engine.generate(ask(1, prompt(1, 3), 4))
        assert_clean(make_decoder(qwen3_config()), prompt(1, 3), done)
        await engine.close()

    asyncio.run(go())


def test_weights_that_are_not_finite_end_every_request_with_an_error(tokenizer):
    engine = make_engine(tokenizer)
    broken = {name: torch.full_like(p, float("nan")) for name, p in make_decoder(qwen3_config()).named_parameters()}

    async def go() -> None:
        await engine.load(broken, 4)
        with pytest.raises(RuntimeError, match="version 4"):
            await engine.generate(ask(0, prompt(0, 3)))
        with pytest.raises(RuntimeError, match="version 4"):
            await engine.generate(ask(1, prompt(0, 3)))
        await engine.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(0, []), "needs tokens"),
        (ask(0, [1], 0), "max_tokens"),
        (ask(0, [1], temperature=-1.0), "temperature"),
        (ask(0, [1, 99]), "vocabulary"),
        (ask(0, [1], stop_tokens=(99,)), "stop token"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused(tokenizer, request_, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(make_engine(tokenizer).generate(request_))


def test_one_session_cannot_generate_twice_at_once(tokenizer):
    engine = make_engine(tokenizer)

    async def go() -> None:
        task = asyncio.create_task(engine.generate(ask(0, prompt(0, 3))))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="already"):
            await engine.generate(ask(0, prompt(0, 3)))
        await task
        await engine.close()

    asyncio.run(go())


def test_a_context_longer_than_the_models_is_refused(tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match="max_context"):
        make_engine(tokenizer, max_context=1000)
