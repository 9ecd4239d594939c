"""vLLM that guesses tokens (n-grams): what it samples and reports is the model's, as without guesses. On the CPU."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support_models import write_folder
from support_served import CONFIG, TOLERANCE, Served, ask, clean, prompt

from async_rl.generator.engine import Completion
from async_rl.weights.canary import fingerprint

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
NUMBA = Path(__file__).parents[2] / ".venv" / "numba"
"""vLLM's n-grams are compiled by it"""
if NUMBA.is_dir():
    sys.path.append(str(NUMBA))  # vLLM's workers get the path of this process
pytest.importorskip("numba", reason="numba is not installed (make numba)")
pytestmark = [pytest.mark.xdist_group("vllm"), pytest.mark.nightly]
GUESSED = 4
NGRAM = {
    "method": "ngram", "num_speculative_tokens": GUESSED, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG)
    served = Served(folder, speculative=NGRAM, worker="support_vllm_worker.WithCount")
    steps(served)  # from here on they are counted, and temperatures are those asked for
    yield served
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


def steps(served: Served) -> int:
    (count,) = served.run(served.engine._ask_workers("async_rl_steps"))
    return int(count)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.3, 0.0])
def test_log_probs_are_those_of_the_trainers_forward(served: Served, temperature: float) -> None:
    requests = [ask(i, prompt(i, 2 + 3 * i), 60, temperature=temperature) for i in range(12)]
    for request, done in zip(requests, served.ask(requests), strict=True):
        assert (done.finish, len(done.tokens)) == ("length", 60)
        expected = clean(served.model, [*request.tokens, *done.tokens], temperature or 1.0)
        assert np.allclose(done.log_probs, expected[len(request.tokens) - 1 :], atol=TOLERANCE)


def test_guesses_are_kept(served: Served) -> None:
    """A greedy answer of a random model runs in circles, which n-grams foresee."""
    before = steps(served)
    (done,) = served.ask([ask(1, prompt(1, 5), 100, temperature=0.0)])
    assert steps(served) - before < 0.7 * len(done.tokens)


def test_samples_are_the_models(served: Served) -> None:
    """The second tokens of many answers to a prompt that repeats itself, where it is guessed: how often each came."""
    repeated, hot = [*prompt(3, 4)] * 5, 1.5
    done = served.ask([ask(i, repeated, 2, temperature=hot) for i in range(1200)])
    token = Counter(one.tokens[0] for one in done).most_common(1)[0][0]
    some = [one.tokens[1] for one in done if one.tokens[0] == token]
    context = [*repeated, token]
    probabilities = np.exp([clean(served.model, [*context, i], hot)[-1] for i in range(CONFIG.vocabulary)])
    expected = len(some) * probabilities
    chosen = expected > 3
    assert chosen.sum() >= 3
    counts = np.bincount(some, minlength=CONFIG.vocabulary)
    deviation = ((counts - expected) / np.sqrt(expected * (1 - probabilities)))[chosen]
    assert np.abs(deviation).max() < 4


def test_versions_are_right_token_by_token_across_updates_in_flight(served: Served) -> None:
    before, requests = served.engine.version, [ask(i, prompt(i, 3), 110, temperature=0.7) for i in range(6)]

    async def with_two_updates() -> list[Completion]:
        turns = [asyncio.ensure_future(served.engine.generate(request)) for request in requests]
        start = served.engine.stats().tokens_generated
        for number, share in ((before + 1, 20), (before + 2, 60)):
            while served.engine.stats().tokens_generated < start + share * len(requests):
                await asyncio.sleep(0.001)
            await served.load(number)
        return await asyncio.gather(*turns)

    for request, done in zip(requests, served.run(with_two_updates()), strict=True):
        versions = np.array(done.versions)
        assert set(done.versions) == {before, before + 1, before + 2}
        assert (np.diff(versions) >= 0).all()
        for version in sorted(set(done.versions)):
            expected = clean(served.models[version], [*request.tokens, *done.tokens], 0.7)[len(request.tokens) - 1 :]
            of_version = versions == version
            assert np.allclose(np.array(done.log_probs)[of_version], expected[of_version], atol=TOLERANCE)


def test_the_canary_holds(served: Served) -> None:
    version = served.engine.version + 1
    served.run(served.load(version))
    assert served.run(served.engine.fingerprint()) == fingerprint(dict(served.model.named_parameters()), version)
    tokens = prompt(7, 60)
    assert np.allclose(served.run(served.engine.probe(tokens)), clean(served.model, tokens), atol=TOLERANCE)


def test_a_turn_ends_at_stop_tokens_among_those_guessed(served: Served) -> None:
    for i in range(8):
        (free,) = served.ask([ask(i, prompt(i, 5), 100, temperature=0.0)])
        stop = free.tokens[-1]
        (done,) = served.ask([ask(i, prompt(i, 5), 100, temperature=0.0, stop_tokens=(stop,))])
        assert done.finish == "stop"
        assert list(done.tokens) == list(free.tokens[: list(free.tokens).index(stop) + 1])
        assert len(done.log_probs) == len(done.tokens)
