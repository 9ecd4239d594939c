"""How episodes that agents play come to their end: each becomes one trajectory, whatever the agent, its client or its
generator does."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from support_agents import (
    HERMES,
    MERGES,
    Played,
    ScriptedEngine,
    agents_tokenizer,
    ask,
    client_of,
    contexts_of,
    play,
    played,
    texts_of,
)
from support_models import make_decoder, qwen3_config
from support_tokenizers import byte_folder

from async_rl.errors import RunFailed
from async_rl.generator.endpoint import Endpoint
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Connection
from async_rl.task.rehearsed import Rehearsed, RehearsedSettings
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack, unpack

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


def test_an_agent_that_raises_when_the_context_is_full_ends_the_episode_at_the_token_limit(
    tokenizer: Tokenizer,
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [USER]
        while True:
            messages += [(await ask(client, messages)).message, {"role": "user", "content": "go on " * 10}]

    made = played(ScriptedEngine(tokenizer, lambda _: "abc", max_context=300), talk)
    assert (made.ended, made.reward, made.reason, made.info["agent/refused"]) == ("length", 0.0, "", 1.0)
    assert len(made.turns) > 1
    assert len(made.tokens) <= 300


def test_an_answer_for_which_the_context_has_no_room_is_cut(tokenizer: Tokenizer) -> None:
    async def talk(client: openai.AsyncOpenAI) -> float:
        assert (await ask(client, [USER])).finish_reason == "length"
        return 0.5

    made = played(ScriptedEngine(tokenizer, lambda _: "abc" * 40, max_context=100), talk)
    assert (made.ended, made.reward, len(made.tokens)) == ("length", 0.5, 100)


async def longest_and_short(problem: Any, session: Any) -> float:
    """One turn without a limit of the agent's, one with it."""
    client = client_of(session.openai())
    asked = [await ask(client, [USER]), await ask(client, [USER], max_tokens=3)]
    assert [choice.finish_reason for choice in asked] == ["length", "length"]
    return 1.0


def test_turns_of_an_agent_are_no_longer_than_the_task_says(tokenizer: Tokenizer) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        with pytest.raises(ValueError, match="max_tokens is 0"):
            session.openai(max_tokens=0)
        session.openai(max_tokens=7)
        return await longest_and_short(problem, session)

    made = asyncio.run(play(ScriptedEngine(tokenizer, lambda _: "abc" * 40), tokenizer, Played(rollout)))
    assert (made.ended, made.reason, [turn.length for turn in made.turns]) == ("finished", "", [7, 3])


def test_a_rehearsal_shortens_the_turns_of_an_agent(tokenizer: Tokenizer) -> None:
    task = Rehearsed(RehearsedSettings(name="played", max_tokens=16), lambda *_: Played(longest_and_short))
    made = asyncio.run(play(ScriptedEngine(tokenizer, lambda _: "abc" * 40), tokenizer, task))
    assert (made.reason, [turn.length for turn in made.turns]) == ("", [16, 3])
    assert made.info["true_reward"] == 1.0


def test_an_agent_that_raises_when_its_turns_are_used_up_ends_the_episode_at_the_turn_limit(
    tokenizer: Tokenizer,
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        while True:
            await ask(client, [USER])

    made = played(ScriptedEngine(tokenizer, lambda _: "abc"), talk, max_turns=3)
    assert (made.ended, made.reward, len(made.turns)) == ("turn_limit", 0.0, 3)


def test_an_agent_that_never_asks_or_blocks_the_event_loop_ends_the_episode_with_a_hint(tokenizer: Tokenizer) -> None:
    async def rollout(problem: Any, session: Any) -> float:
        reached = session.openai()
        client = openai.OpenAI(base_url=reached.base_url, api_key=reached.api_key, timeout=0.2, max_retries=0)
        try:
            client.chat.completions.create(model="policy", messages=[USER])  # type: ignore[list-item]
        except openai.APITimeoutError:
            await asyncio.Event().wait()
        return 1.0

    made = asyncio.run(play(ScriptedEngine(tokenizer, []), tokenizer, Played(rollout), limit_s=0.3))
    assert (made.ended, made.turns) == ("error", ())
    assert "goes into a thread: asyncio.to_thread" in made.reason


def test_time_in_which_an_answer_is_sampled_is_not_the_tasks(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "hi"], gate=asyncio.Event())

    async def rollout(problem: Any, session: Any) -> float:
        client = client_of(session.openai())
        asking = asyncio.ensure_future(ask(client, [USER]))
        await asyncio.sleep(0.8)
        assert engine.gate is not None
        engine.gate.set()
        await asking
        return 1.0

    made = asyncio.run(play(engine, tokenizer, Played(rollout), limit_s=0.5))
    assert (made.ended, made.reason) == ("finished", "")


def test_an_agents_own_error_is_the_episodes(tokenizer: Tokenizer) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        await ask(client, [USER])
        raise KeyError("gold")

    made = played(ScriptedEngine(tokenizer, ["abc"]), talk)
    assert (made.ended, len(made.turns)) == ("error", 1)
    assert "KeyError: 'gold'" in made.reason


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_sampled_for_an_agent_that_went_away_is_kept(tokenizer: Tokenizer, stream: bool) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "hi"], gate=asyncio.Event())

    async def talk(client: openai.AsyncOpenAI) -> None:
        asking = asyncio.ensure_future(
            client.chat.completions.create(model="policy", messages=[USER], stream=stream)  # type: ignore[call-overload]
        )
        await engine.begun.wait()
        asking.cancel()
        while engine.running:
            await asyncio.sleep(0.001)
        engine.gate = None
        await ask(client, [USER])

    made = played(engine, talk)
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(made, tokenizer) == [f"{start}[ab]", f"{start}[hi<|im_end|>]"]
    assert (made.info["agent/cancelled"], made.ended) == (1.0, "finished")


def test_a_stream_shows_that_it_is_alive_and_can_still_fail(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_rl.generator.endpoint.ALIVE_S", 0.01)
    engine = ScriptedEngine(tokenizer, ["abc", "hi"], gate=asyncio.Event())

    async def talk(client: openai.AsyncOpenAI) -> None:
        headers = {"Authorization": f"Bearer {client.api_key}"}
        body = {"model": "policy", "messages": [USER], "stream": True}
        async with client._client.stream(
            "POST", f"{client.base_url}chat/completions", json=body, headers=headers
        ) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": sampling"
            assert engine.gate is not None
            engine.gate.set()
            rest = [line async for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert "abc" in rest[1]

    played(engine, talk)


def test_the_key_is_valid_no_longer_than_the_episode(tokenizer: Tokenizer) -> None:
    left: list[Any] = []

    async def both() -> None:
        endpoint = Endpoint()

        async def rollout(problem: Any, session: Any) -> float:
            left.append(client_of(session.openai()))
            assert session.openai() == session.openai()
            await ask(left[0], [USER])
            return 1.0

        engine = ScriptedEngine(tokenizer, ["abc"])
        made = await play(engine, tokenizer, Played(rollout), endpoint=endpoint)
        with pytest.raises(openai.AuthenticationError, match="that of one episode"):
            await ask(left[0], [USER])
        assert len(made.turns) == 1
        await endpoint.shut()

    asyncio.run(both())


def test_a_request_that_is_left_running_ends_with_the_episode(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc"], gate=asyncio.Event())
    ended: list[BaseException] = []

    async def both() -> Trajectory:
        endpoint = Endpoint()

        async def rollout(problem: Any, session: Any) -> float:
            client = client_of(session.openai())
            asking = asyncio.ensure_future(ask(client, [USER]))
            asking.add_done_callback(lambda done: ended.append(done.exception()))  # type: ignore[arg-type]
            await engine.begun.wait()
            return 1.0

        made = await play(engine, tokenizer, Played(rollout), endpoint=endpoint)
        while not ended:
            await asyncio.sleep(0.001)
        await endpoint.shut()
        return made

    made = asyncio.run(both())
    assert (made.turns, made.ended, made.reward) == ((), "finished", 1.0)
    assert isinstance(ended[0], openai.ConflictError)


def test_an_engine_that_died_ends_the_generator_whatever_the_agent_makes_of_it(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, [], error=RunFailed("the engine died"))

    async def talk(client: openai.AsyncOpenAI) -> None:
        while True:
            try:
                await ask(client, [USER])
            except openai.InternalServerError:
                await asyncio.sleep(0.01)

    with pytest.raises(RunFailed, match="the engine died"):
        played(engine, talk)


def test_threads_play_many_episodes_at_once_with_openais_blocking_client(tokenizer: Tokenizer) -> None:
    barrier = threading.Barrier(8)

    def agent(connection: Connection, number: int) -> float:
        client = openai.OpenAI(base_url=connection.base_url, api_key=connection.api_key)
        messages: list[Any] = [{"role": "user", "content": f"episode {number}"}]
        for _ in range(3):
            barrier.wait(timeout=20)
            said = client.chat.completions.create(model=connection.model, messages=messages).choices[0].message
            messages += [{"role": "assistant", "content": said.content}, USER]
        client.close()
        return float(number)

    async def all_of_them() -> list[Trajectory]:
        endpoint = Endpoint()

        async def rollout(problem: Any, session: Any) -> float:
            number = session.seed % 1000
            return await asyncio.to_thread(agent, session.openai(), number)

        from concurrent.futures import ThreadPoolExecutor

        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
        engine = ScriptedEngine(tokenizer, lambda history: history.split("episode ")[1].split("<")[0])
        made = await asyncio.gather(
            *(play(engine, tokenizer, Played(rollout), sample=i, endpoint=endpoint) for i in range(8))
        )
        await endpoint.shut()
        return made

    found = asyncio.run(all_of_them())
    for made in found:
        (text,) = texts_of(made, tokenizer)
        assert made.ended == "finished", made.reason
        assert text.count(f"[{made.reward:.0f}<|im_end|>]") == 3, "each episode has its own history"
    assert len({made.reward for made in found}) > 1


# ------------------------------------------------------------------------------------------------ lost generators


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4, 5])
def test_an_episode_goes_on_behind_the_turns_that_a_lost_generator_saved(tokenizer: Tokenizer, dies_at: int) -> None:
    def script(history: str) -> str:
        return f"abc {len(history)}"

    async def talk(client: openai.AsyncOpenAI) -> None:
        first = (await ask(client, [USER])).message
        histories = [[USER, first, {"role": "user", "content": f"part {i}"}] for i in range(2)]
        parts = await asyncio.gather(*(ask(client, history) for history in histories))
        again = [*histories[0], parts[0].message, USER]
        await ask(client, again)
        await ask(client, [{"role": "system", "content": "sum up"}, USER])
        await ask(client, [*again[:-1], {"role": "user", "content": "otherwise"}])

    whole = played(ScriptedEngine(tokenizer, script), talk)
    saved: list[Trajectory] = []

    class Dies(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            if len(self.asked) == dies_at:
                raise RunFailed("gone")
            return await super().generate(request)

    with pytest.raises(RunFailed):
        played(Dies(tokenizer, script), talk, saved=saved)
    engine = ScriptedEngine(tokenizer, script)
    record = unpack(pack(saved[-1]))

    async def rollout(problem: Any, session: Any) -> float:
        await talk(client_of(session.openai()))
        return 1.0

    prompt = ({"role": "user", "content": "a task"},)
    again = asyncio.run(play(engine, tokenizer, Played(rollout, prompt), record=record))
    assert sorted(texts_of(again, tokenizer)) == sorted(texts_of(whole, tokenizer))
    assert len(engine.asked) == len(whole.turns) - len(record.turns), "only the missing turns are sampled"


def test_an_agent_that_asks_in_another_order_than_the_lost_one_gets_the_saved_turns_it_comes_to(
    tokenizer: Tokenizer,
) -> None:
    first, second = [USER], [{"role": "user", "content": "other"}]

    def agent(order: list[Any]) -> Any:
        async def rollout(problem: Any, session: Any) -> float:
            client = client_of(session.openai())
            for messages in order:
                await ask(client, messages)
            return 1.0

        return Played(rollout, "abc")

    saved: list[Trajectory] = []
    lost = ScriptedEngine(tokenizer, lambda h: f"lost {len(h)}")
    asyncio.run(play(lost, tokenizer, agent([first, second]), saved=saved))
    engine = ScriptedEngine(tokenizer, lambda h: f"new {len(h)}")
    new = [{"role": "user", "content": "something new"}]
    made = asyncio.run(play(engine, tokenizer, agent([new, second]), record=saved[-1]))
    assert (made.ended, len(made.turns), len(engine.asked)) == ("finished", 2, 1)
    assert ["lost" in text for text in texts_of(made, tokenizer)] == [False, True]


def test_the_embedded_engine_keeps_what_it_sampled_for_an_agent_that_went_away(tmp_path: Path) -> None:
    from async_rl.generator.embedded import EmbeddedEngine

    tokenizer = Tokenizer(byte_folder(tmp_path / "t", template=HERMES, merges=MERGES, eos="<|endoftext|>"))
    model = make_decoder(qwen3_config(vocabulary=tokenizer.vocab_size, max_context=4000))

    async def main() -> Trajectory:
        engine = EmbeddedEngine(model, tokenizer, max_sequences=2)

        async def rollout(problem: Any, session: Any) -> float:
            client = client_of(session.openai())
            asking = [asyncio.ensure_future(ask(client, [USER])) for _ in range(3)]  # one waits for a place
            while engine.stats().tokens_generated < 20:
                await asyncio.sleep(0)
            for one in asking:
                one.cancel()
            while engine.stats().running or engine.stats().waiting:
                await asyncio.sleep(0)
            await ask(client, [USER], max_tokens=4)
            return 1.0

        made = await play(engine, tokenizer, Played(rollout))
        lengths = [turn.length for turn in made.turns]
        for context, turn in zip(contexts_of(made), made.turns, strict=True):
            log_probs = await engine.probe(made.tokens[context].tolist())
            sampled = log_probs[turn.start - context.start - 1 :]
            recorded = made.log_behaviour[turn.start : turn.start + turn.length]
            assert recorded.tolist() == pytest.approx(sampled, abs=1e-4)
        await engine.close()
        assert 4 in lengths
        assert len(lengths) == 3
        assert sum(lengths) >= 24
        return made

    made = asyncio.run(main())
    assert (made.ended, made.info["agent/cancelled"]) == ("finished", 3.0)
