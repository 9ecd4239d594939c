"""The contract of an engine, kept by vLLM itself on the CPU. One vLLM serves all tests of this file."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_contexts import judge, meet
from support_models import make_decoder, write_folder
from support_served import CONFIG, CONTEXT, TOLERANCE, Served, ask, clean, prompt

from async_rl.errors import RunFailed, UserError
from async_rl.generator.engine import Completion
from async_rl.generator.pull import ReaderSource
from async_rl.model.tokenizer import Tokenizer
from async_rl.weights.canary import fingerprint
from async_rl.weights.shared_memory import WeightPublisher, WeightReader

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
pytestmark = pytest.mark.xdist_group("vllm")
USER = {"role": "user", "content": "12"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(write_folder(tmp_path_factory.mktemp("model") / "m", CONFIG))
    yield served
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_the_trainers_forward(served: Served, temperature: float) -> None:
    requests = [ask(i, prompt(i, 1 + 5 * i), 3 + 2 * i, temperature=temperature) for i in range(12)]
    for request, done in zip(requests, served.ask(requests), strict=True):
        assert done.finish == "length"
        assert len(done.tokens) == request.params.max_tokens
        assert set(done.versions) == {served.engine.version}
        expected = clean(served.model, [*request.tokens, *done.tokens], temperature or 1.0)
        assert np.allclose(done.log_probs, expected[len(request.tokens) - 1 :], atol=TOLERANCE)


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch(served: Served) -> None:
    requests = [ask(i, prompt(i, 4 + i), 10) for i in range(8)]
    together = served.ask(requests)
    alone = [served.ask([request])[0] for request in reversed(requests)][::-1]
    assert [list(done.tokens) for done in together] == [list(done.tokens) for done in alone]
    assert len({tuple(done.tokens) for done in together}) > 1


def test_an_episode_of_several_contexts_is_what_the_trainer_computes(served: Served, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_folder(tmp_path / "m", CONFIG))
    judge(served.run(meet(served.engine, tokenizer, number=8, max_context=CONTEXT)), served.model, TOLERANCE)


def test_an_agent_plays_through_the_endpoint_and_texts_are_scored(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from support_agents import Played, client_of, contexts_of, play
    from support_agents import ask as say

    tokenizer = Tokenizer(write_folder(tmp_path / "m", CONFIG))
    scores: list[Any] = []

    async def rollout(problem: Any, session: Any) -> float:
        client = client_of(session.openai())
        first, second = await asyncio.gather(*(say(client, [USER], max_tokens=6) for _ in range(2)))
        gone = asyncio.ensure_future(say(client, [USER, {"role": "user", "content": "x"}]))
        while not served.engine.stats().running:
            await asyncio.sleep(0.01)
        gone.cancel()
        await say(client, [USER, first.message, USER], max_tokens=6, temperature=0.5)
        scores.append(await session.score("12+34"))
        return float(first.message.content != second.message.content)

    made = served.run(play(served.engine, tokenizer, Played(rollout, "12"), timeout_s=60.0))
    for context in contexts_of(made):
        for turn in (turn for turn in made.turns if context.start <= turn.start < context.stop):
            expected = clean(served.model, made.tokens[context].tolist(), turn.temperature or 1.0)
            start, recorded = turn.start - context.start, made.log_behaviour[turn.start :][: turn.length]
            assert np.allclose(recorded, expected[start - 1 :][: turn.length], atol=TOLERANCE)
    assert (made.ended, made.reason, made.reward) == ("finished", "", 1.0)
    whole = tokenizer.encode("12") + tokenizer.encode("12+34")
    assert np.allclose(scores[0].log_probs, clean(served.model, whole)[1:], atol=TOLERANCE)
    assert scores[0].version == served.engine.version


def test_a_turn_ends_at_stop_tokens_and_strings_and_keeps_them(served: Served) -> None:
    (done,) = served.ask([ask(1, prompt(1, 5), 100, stop_tokens=tuple(range(20)))])
    assert done.finish == "stop"
    assert done.tokens[-1] in range(20)
    assert not set(done.tokens[:-1]) & set(range(20))
    (done,) = served.ask([ask(2, prompt(2, 5), 100, stop_strings=("0", "1", "2", "3"))])
    assert done.finish == "stop"
    assert done.tokens[-1] in range(4)  # the alphabet begins with the digits
    (done,) = served.ask([ask(3, prompt(3, 5), 120, stop_strings=("<|pad|>",))])
    assert (done.finish, done.tokens[-1]) == ("stop", CONFIG.vocabulary - 1)  # a special token


def test_a_full_context_ends_a_turn_and_a_longer_history_gets_none(served: Served) -> None:
    (done,) = served.ask([ask(3, prompt(3, CONTEXT - 5), 50)])
    assert (done.finish, len(done.tokens)) == ("length", 5)
    (done,) = served.ask([ask(4, prompt(4, CONTEXT), 50)])
    assert (done.finish, len(done.tokens)) == ("length", 0)
    with pytest.raises(ValueError, match="out of vocabulary"):
        served.ask([ask(5, [10_000], 5)])


def test_versions_are_right_token_by_token_across_updates_in_flight(served: Served) -> None:
    before, requests = served.engine.version, [ask(i, prompt(i, 3), 120) for i in range(6)]

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
        whole = [*request.tokens, *done.tokens]
        for version in sorted(set(done.versions)):  # the cache was rebuilt: each token is of its version's policy
            expected = clean(served.models[version], whole)[len(request.tokens) - 1 :]
            of_version = versions == version
            assert np.allclose(np.array(done.log_probs)[of_version], expected[of_version], atol=TOLERANCE)


def test_a_release_that_keeps_no_spans_gives_the_same_versions(served: Served) -> None:
    """vLLM has none before 0.32: the engine counts what had come when it paused."""
    has_spans, served.engine._has_spans = served.engine._has_spans, False
    try:
        test_versions_are_right_token_by_token_across_updates_in_flight(served)
    finally:
        served.engine._has_spans = has_spans
        served.run(served.load(served.engine.version + 1))


def test_the_weights_shown_are_the_weights_held(served: Served) -> None:
    version = served.engine.version + 1
    served.run(served.load(version))
    assert served.run(served.engine.fingerprint()) == fingerprint(dict(served.model.named_parameters()), version)
    tokens = prompt(7, 60)
    assert np.allclose(served.run(served.engine.probe(tokens)), clean(served.model, tokens), atol=TOLERANCE)
    partial = {n: p.detach().clone() for n, p in served.model.named_parameters()}
    partial["model.layers.1.self_attn.k_proj.weight"] += 0.1
    served.run(served.engine.load(partial, version))
    shown, right = served.run(served.engine.fingerprint()), fingerprint(dict(served.model.named_parameters()), version)
    assert {name for name in right if shown[name] != right[name]} == {"model.layers.1.self_attn.k_proj.weight"}


def test_a_probe_has_a_seat_while_every_sequence_is_taken(served: Served) -> None:
    """Also where more turns wait: an episode may have several. The probe ends before any of them does."""
    served.run(served.load(served.engine.version + 1))
    tokens, seats = prompt(7, 60), served.engine._options.max_sequences
    requests = [ask(i, prompt(i, 3), 120) for i in range(2 * seats)]

    async def probe() -> tuple[list[int], Sequence[float], list[Completion]]:
        turns = [asyncio.ensure_future(served.engine.generate(request)) for request in requests]
        start = served.engine.stats().tokens_generated
        while served.engine.stats().tokens_generated < start + 2 * seats:
            await asyncio.sleep(0.001)
        stats = served.engine.stats()
        shown = await served.engine.probe(tokens)
        assert not any(turn.done() for turn in turns)
        return [stats.running, stats.waiting], shown, await asyncio.gather(*turns)

    counts, shown, done = served.run(probe())
    assert counts == [seats, seats]
    assert np.allclose(shown, clean(served.model, tokens), atol=TOLERANCE)
    assert [len(completion.tokens) for completion in done] == [120] * len(requests)


def test_a_turn_that_waits_for_a_seat_can_be_given_up(served: Served) -> None:
    seats = served.engine._options.max_sequences

    async def give_up() -> list[Completion]:
        turns = [asyncio.ensure_future(served.engine.generate(ask(i, prompt(i, 3), 100))) for i in range(seats + 3)]
        await asyncio.sleep(0)
        served.engine.release(seats + 1)
        turns[seats + 2].cancel()
        given_up = await turns[seats + 1]
        assert not turns[0].done()
        return [given_up, *await asyncio.gather(*turns[: seats + 1])]

    given_up, *done = served.run(give_up())
    assert (given_up.finish, list(given_up.tokens)) == ("aborted", [])
    assert [len(completion.tokens) for completion in done] == [100] * (seats + 1)
    assert served.engine._seats._free == seats


def test_workers_copy_a_version_out_of_shared_memory_themselves(served: Served, tmp_path: Path) -> None:
    """Nothing of it passes through this process, and where the trainer goes on meanwhile they take what is newest."""
    before, path = served.engine.version, tmp_path / "segment"
    models = {v: make_decoder(CONFIG, v) for v in range(before + 1, before + 7)}
    served.models |= models

    def weights(version: int) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in models[version].named_parameters()}

    def held(version: int) -> bool:
        shown = served.run(served.engine.fingerprint())
        return served.engine.version == version and shown == fingerprint(weights(version), version)

    with WeightPublisher(path, weights(before + 1)) as publisher:
        reader = WeightReader(path, timeout_s=20.0)
        reader.read = None  # type: ignore[method-assign,assignment]  # no copy is made here
        source = ReaderSource(reader)
        publisher.publish(weights(before + 1), before + 1)
        served.run(source.pull_into(served.engine, first=False))
        assert held(before + 1)
        (done,) = served.ask([ask(300, prompt(3, 9), 20)])
        expected = clean(served.model, [*prompt(3, 9), *done.tokens])[8:]
        assert np.allclose(done.log_probs, expected, atol=TOLERANCE)
        served.run(source.pull_into(served.engine, first=False))
        assert held(before + 1), "nothing newer: nothing changes"

        pause, published = served.engine._pause, [before + 2]

        async def pause_late() -> None:
            """The trainer publishes three versions after this one was found."""
            await pause()
            while published[-1] < before + 5:
                published.append(published[-1] + 1)
                publisher.publish(weights(published[-1]), published[-1])

        publisher.publish(weights(before + 2), before + 2)
        served.engine._pause = pause_late
        try:
            served.run(source.pull_into(served.engine, first=False))
        finally:
            del served.engine._pause
        assert held(before + 5)
        other = dict(weights(before + 5))
        other["model.norm.weight"] = torch.zeros(CONFIG.hidden + 1)
        with WeightPublisher(tmp_path / "other", other) as wrong:
            wrong.publish(other, before + 6)
            pull = ReaderSource(WeightReader(tmp_path / "other")).pull_into(served.engine, first=False)
            with pytest.raises(UserError, match=r"not the one that is trained: model\.norm\.weight has shape"):
                served.run(pull)
        assert held(before + 5)
        source.close()


def test_weights_of_another_model_are_refused_and_change_nothing(served: Served) -> None:
    before = served.run(served.engine.fingerprint())
    larger = {n: p.detach() for n, p in served.model.named_parameters()}
    larger["model.embed_tokens.weight"] = torch.zeros(CONFIG.vocabulary + 8, CONFIG.hidden)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight has shape"):
        served.run(served.engine.load(larger, served.engine.version + 1))
    assert served.run(served.engine.fingerprint()) == before


def test_a_released_session_ends_aborted_with_what_it_has(served: Served) -> None:
    async def abort() -> Completion:
        turn = asyncio.ensure_future(served.engine.generate(ask(9, prompt(9, 3), 120)))
        start = served.engine.stats().tokens_generated
        while served.engine.stats().tokens_generated < start + 5:
            await asyncio.sleep(0.001)
        served.engine.release(9)
        return await turn

    done = served.run(abort())
    assert done.finish == "aborted"
    assert 5 <= len(done.tokens) == len(done.log_probs) == len(done.versions) < 120


def test_a_dead_engine_is_told_apart_from_a_failed_request(tmp_path: Path) -> None:
    served = Served(write_folder(tmp_path / "m", CONFIG), worker="support_vllm_worker.WithPid")
    (worker,) = served.run(served.engine._ask_workers("async_rl_pid"))

    async def killed() -> Completion:
        turn = asyncio.ensure_future(served.engine.generate(ask(1, prompt(1, 3), 120)))
        while not served.engine.stats().tokens_generated:
            await asyncio.sleep(0.001)
        os.kill(worker, signal.SIGKILL)
        return await turn

    with pytest.raises(RunFailed, match="vLLM's engine died"):
        served.run(killed())
    with pytest.raises(RunFailed, match="vLLM's engine died"):
        served.ask([ask(2, prompt(2, 3), 5)])
    served.run(served.engine.close())
    served.loop.call_soon_threadsafe(served.loop.stop)


OWNER_SCRIPT = """
import sys
from pathlib import Path
from support_served import Served

if __name__ == "__main__":
    served = Served(Path(sys.argv[1]), worker="support_vllm_worker.WithPid")
    print("worker", *served.run(served.engine._ask_workers("async_rl_pid")), flush=True)
    served.thread.join()
"""


@pytest.mark.nightly
def test_vllms_processes_end_with_a_killed_owner(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CONFIG)
    script = tmp_path / "owner.py"
    script.write_text(OWNER_SCRIPT)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    owner = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert owner.stdout is not None
    try:
        said = next(line for line in owner.stdout if line.startswith("worker "))  # vLLM talks too
        worker = int(said.split()[1])
        held = [os.pidfd_open(pid) for pid in (worker, parent_of(worker))]
    finally:
        owner.kill()
        owner.wait()
    for process in held:
        ended, _, _ = select.select([process], [], [], 30.0)
        assert ended, "a process of vLLM is left over"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
