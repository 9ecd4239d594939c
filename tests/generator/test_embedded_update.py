"""Weights replaced in flight: every token keeps the version that sampled it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Completion, Request, SamplingParams
from async_rl.generator.pull import ReaderSource
from async_rl.model.attention import DocumentAttention
from async_rl.model.tokenizer import Tokenizer
from async_rl.weights.canary import fingerprint
from async_rl.weights.shared_memory import WeightPublisher, WeightReader, WeightsError

TOLERANCE = 1e-5
CONFIG = qwen3_config()
MODELS = [make_decoder(CONFIG, seed) for seed in range(3)]
"""very different weights, one set a version"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG))


def weights_of(version: int) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in MODELS[version].named_parameters()}


def log_probs_under(version: int, tokens: list[int]) -> np.ndarray:
    """Log-prob of each token but the first, by a clean forward under the weights of `version`."""
    ids, model = torch.tensor(tokens), MODELS[version]
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), DocumentAttention([len(ids)]))
        log_probs = torch.log_softmax(hidden @ model.head.T, -1)
    return log_probs[:-1].gather(1, ids[1:, None]).squeeze(1).numpy()


def difference(history: list[int], done: Completion) -> np.ndarray:
    """|recorded log-prob - that of a clean forward under the version that sampled the token|."""
    tokens = [*history, *done.tokens]
    by_version = {version: log_probs_under(version, tokens) for version in set(done.versions)}
    at = range(len(history) - 1, len(tokens) - 1)
    expected = [by_version[version][i] for i, version in zip(at, done.versions, strict=True)]
    return np.abs(np.array(done.log_probs) - np.array(expected))


def prompt(session: int) -> list[int]:
    return [3 + session, 7, 2 * session, 9]


def request(session: int, history: list[int], max_tokens: int = 30) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(session=session, tokens=history, params=params, seed=50 + session)


def make_engine(tokenizer: Tokenizer, kv: Literal["recompute", "keep"], **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(make_decoder(CONFIG, 0), tokenizer, kv_on_update=kv, **options)


async def decode_through_two_updates(engine: EmbeddedEngine) -> list[Completion]:
    """Eight turns of up to 30 tokens; versions 1 and 2 arrive while they run."""
    tasks = [asyncio.create_task(engine.generate(request(s, prompt(s)))) for s in range(8)]
    for version, after in ((1, 60), (2, 130)):
        while engine.stats().tokens_generated < after:
            await asyncio.sleep(0)
        await engine.load(weights_of(version), version)
        assert engine.version == version
    done = await asyncio.gather(*tasks)
    await engine.close()
    return done


@pytest.mark.parametrize("prefill_tokens", [2048, 7])
def test_with_recompute_every_log_prob_is_that_of_the_version_that_sampled_it(tokenizer, prefill_tokens):
    engine = make_engine(tokenizer, "recompute", prefill_tokens=prefill_tokens)
    done = asyncio.run(decode_through_two_updates(engine))
    seen = set()
    for session, completion in enumerate(done):
        assert list(completion.versions) == sorted(completion.versions)
        seen |= set(completion.versions)
        assert difference(prompt(session), completion).max() < TOLERANCE
    assert seen == {0, 1, 2}


def test_with_keep_versions_are_recorded_and_only_later_tokens_leave_their_policy(tokenizer):
    done = asyncio.run(decode_through_two_updates(make_engine(tokenizer, "keep")))
    after = []
    for session, completion in enumerate(done):
        wrong = difference(prompt(session), completion)
        old = np.array(completion.versions) == 0
        assert wrong[old].max() < TOLERANCE
        after.append(wrong[~old])
    assert np.concatenate(after).mean() > 0.01


def test_an_idle_session_is_rebuilt_under_the_new_weights_when_it_speaks_again(tokenizer):
    engine = make_engine(tokenizer, "recompute")

    async def go() -> None:
        history = prompt(1)
        for version in range(3):
            if version:
                await engine.load(weights_of(version), version)
            done = await engine.generate(request(1, history, 5))
            assert set(done.versions) == {version}
            assert difference(history, done).max() < TOLERANCE
            history = [*history, *done.tokens, 4]
        await engine.close()

    asyncio.run(go())


def test_what_is_sampled_before_an_update_does_not_depend_on_it(tokenizer):
    async def undisturbed() -> list[Completion]:
        engine = make_engine(tokenizer, "recompute")
        done = await asyncio.gather(*(engine.generate(request(s, prompt(s))) for s in range(8)))
        await engine.close()
        return done

    plain = asyncio.run(undisturbed())
    updated = asyncio.run(decode_through_two_updates(make_engine(tokenizer, "recompute")))
    for before, after in zip(plain, updated, strict=True):
        same = after.versions.count(0) if isinstance(after.versions, list) else 0
        assert same > 0
        assert before.tokens[:same] == after.tokens[:same]


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tokenizer):
    engine = make_engine(tokenizer, "recompute")
    missing = weights_of(1)
    missing.pop("model.norm.weight")
    misshapen = weights_of(1) | {"model.norm.weight": torch.ones(3)}

    async def go() -> None:
        before = await engine.probe([1, 2, 3])
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            await engine.load(missing, 1)
        with pytest.raises(ValueError, match=r"\[3\]"):
            await engine.load(misshapen, 1)
        assert await engine.probe([1, 2, 3]) == before
        assert engine.version == 0
        await engine.load(weights_of(1), 1)
        assert np.allclose(await engine.probe([1, 2, 3]), log_probs_under(1, [1, 2, 3]), atol=TOLERANCE)

    asyncio.run(go())


def test_weights_of_another_dtype_are_converted(tokenizer):
    engine = make_engine(tokenizer, "recompute")
    half = {name: p.to(torch.bfloat16) for name, p in weights_of(1).items()}
    asyncio.run(engine.load(half, 1))
    assert np.allclose(asyncio.run(engine.probe([1, 2, 3])), log_probs_under(1, [1, 2, 3]), atol=0.2)


def test_weights_are_read_from_shared_memory_in_place_while_turns_run(tokenizer, tmp_path):
    path = tmp_path / "weights"
    engine = make_engine(tokenizer, "recompute")
    held = {name: p.data_ptr() for name, p in engine._model.named_parameters()}

    async def go() -> list[Completion]:
        source = ReaderSource(WeightReader(path))
        tasks = [asyncio.create_task(engine.generate(request(s, prompt(s)))) for s in range(8)]
        for version, after in ((1, 60), (2, 130)):
            while engine.stats().tokens_generated < after:
                await asyncio.sleep(0)
            publisher.publish(weights_of(version), version)
            await source.pull_into(engine, first=False)
            assert engine.version == version
            assert await engine.fingerprint() == fingerprint(weights_of(version), version)
        done = await asyncio.gather(*tasks)
        await engine.close()
        source.close()
        return done

    with WeightPublisher(path, weights_of(0)) as publisher:
        done = asyncio.run(go())
    assert {name: p.data_ptr() for name, p in engine._model.named_parameters()} == held
    for session, completion in enumerate(done):
        assert set(completion.versions) <= {0, 1, 2}
        assert difference(prompt(session), completion).max() < TOLERANCE


def test_nothing_is_sampled_while_weights_are_overwritten_nor_after_that_failed(tokenizer):
    engine = make_engine(tokenizer, "recompute")
    seen: list[int] = []

    def broken(targets: Any) -> int:
        next(iter(targets.values())).zero_()
        seen.append(engine.stats().tokens_generated)
        raise WeightsError("the trainer is gone")

    def unfit(targets: Any) -> int:
        raise ValueError("another model")

    async def go() -> None:
        task = asyncio.create_task(engine.generate(request(0, prompt(0), 100)))
        while engine.stats().tokens_generated < 5:
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="another model"):
            await engine.load_in_place(unfit)
        while engine.stats().tokens_generated < 10:
            await asyncio.sleep(0)
        with pytest.raises(WeightsError):
            await engine.load_in_place(broken)
        for _ in range(20):
            await asyncio.sleep(0)
        assert [engine.stats().tokens_generated] == seen
        await engine.close()
        assert (await task).finish == "aborted"

    asyncio.run(go())
