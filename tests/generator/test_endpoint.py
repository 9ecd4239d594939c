"""Agents that play episodes through the endpoint, with OpenAI's own client: what they send is matched to what was
sampled, token by token, and every episode ends in one trajectory."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from support_agents import (
    FORGETFUL,
    WEATHER,
    Played,
    ScriptedEngine,
    agents_tokenizer,
    contexts_of,
    play,
    sampled_as,
    texts_of,
)

from async_rl.errors import RunFailed
from async_rl.generator.endpoint import Endpoint
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Connection
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack, unpack

USER = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "get_weather",  "arguments": {"city":   "abc"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


def client_of(connection: Connection, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=connection.base_url, api_key=connection.api_key, max_retries=0, **more)


async def ask(client: openai.AsyncOpenAI, messages: list[Any], **more: Any) -> Any:
    return (await client.chat.completions.create(model="policy", messages=messages, **more)).choices[0]


def played(engine: ScriptedEngine, talk: Callable[[openai.AsyncOpenAI], Any], **more: Any) -> Trajectory:
    """The trajectory of an episode in which `talk(client)` is the agent; its reward is what that returns, or 1."""

    async def rollout(problem: Any, session: Any) -> float:
        return float(await talk(client_of(session.openai())) or 1.0)

    prompt = more.pop("prompt", ({"role": "user", "content": "a task"},))
    made = asyncio.run(play(engine, engine.tokenizer, Played(rollout, prompt), **more))
    sampled_as(made, engine)
    return made


# ------------------------------------------------------------------------------------------------ matching


def test_a_history_that_continues_keeps_every_sampled_token(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "\n hi there  ", "abc"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [USER]
        for more in ("abc", "and now?", "x"):
            said = await ask(client, messages)
            messages += [
                {"role": "assistant", "content": said.message.content.strip()},
                {"role": "user", "content": more},
            ]

    made = played(engine, talk)
    assert texts_of(made, tokenizer) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[abc<|im_end|>]\n"
        "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n[\n hi there  <|im_end|>]\n"
        "<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n[abc<|im_end|>]"
    ]
    first = made.turns[0]
    assert made.tokens[first.start : first.start + 3].tolist() == [tokenizer.encode(c)[0] for c in "abc"]
    assert tokenizer.encode("abc") != [tokenizer.encode(c)[0] for c in "abc"], "it would be tokenised otherwise"
    assert (made.reward, made.ended, made.info["agent/contexts"]) == (1.0, "finished", 1.0)


def test_the_problems_own_prompt_is_continued(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        await ask(client, [USER])

    made = played(engine, talk, prompt=(USER,))
    assert made.contexts == ()
    assert made.info["agent/contexts"] == 0.0


def test_a_turn_that_was_cut_gets_the_end_that_the_template_writes(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abcdef", "one stop two", "z"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        first = await ask(client, [USER], max_tokens=3)
        assert (first.message.content, first.finish_reason) == ("abc", "length")
        messages: list[Any] = [USER, first.message, USER]
        second = await ask(client, messages, stop=["stop"])
        assert (second.message.content, second.finish_reason) == ("one ", "stop")
        await ask(client, [*messages, second.message, USER])

    (text,) = texts_of(played(engine, talk), tokenizer)
    between = "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(f"[abc]{between}[one stop]{between}[z<|im_end|>]")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_and_found_again_however_they_are_written(tokenizer: Tokenizer, stream: bool) -> None:
    engine = ScriptedEngine(tokenizer, [f"Let me see.\n{CALL}", "sunny", CALL, "done"])

    async def said(client: openai.AsyncOpenAI, messages: list[Any]) -> Any:
        if not stream:
            choice = await ask(client, messages, tools=[WEATHER])
            return choice.message.model_dump(exclude_none=True), choice.finish_reason
        content, calls, finish = "", {}, ""
        async for chunk in await client.chat.completions.create(
            model="policy", messages=messages, tools=[WEATHER], stream=True
        ):
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                calls[call.index] = call.model_dump(exclude={"index"})
            finish = choice.finish_reason or finish
        return {"role": "assistant", "content": content, "tool_calls": list(calls.values())}, finish

    async def talk(client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [USER]
        for number, expected in enumerate(("Let me see.", "sunny", "", "done")):
            message, finish = await said(client, messages)
            assert (message.get("content") or "") == expected
            assert finish == ("stop" if number % 2 else "tool_calls")
            messages.append(message)
            if finish == "tool_calls":
                (call,) = message["tool_calls"]
                assert (call["id"], call["function"]["name"]) == (f"call0000{number // 2}", "get_weather")
                arguments = json.loads(call["function"]["arguments"])
                assert arguments == {"city": "abc"}
                call["function"]["arguments"] = json.dumps(arguments, indent=2)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "sun"})
            else:
                messages.append(USER)

    made = played(engine, talk)
    (text,) = texts_of(made, tokenizer)
    assert f"[Let me see.\n{CALL}<|im_end|>]\n<|im_start|>tool\nsun<|im_end|>" in text
    assert len(made.turns) == 4
    assert made.info["agent/requests"] == 4.0


@pytest.mark.parametrize("said", ['<tool_call>\n{"name": "x", nonsense</tool_call>', "<tool_call>\n[1]\n</tool_call>"])
def test_a_call_that_cannot_be_read_is_text(tokenizer: Tokenizer, said: str) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        choice = await ask(client, [USER], tools=[WEATHER])
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (said, None, "stop")

    played(ScriptedEngine(tokenizer, [said]), talk)


def test_an_edited_history_is_a_new_context_in_which_sampled_tokens_are_only_read(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "hi", "abc abc", "z"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        first = (await ask(client, [USER])).message
        second = (await ask(client, [USER, first, USER])).message
        edited = {"role": "user", "content": "something else"}
        await ask(client, [USER, first, edited])  # the last question was another one
        await ask(client, [{"role": "system", "content": "new"}, USER, first, USER, second, edited])  # from the start

    made = played(engine, talk)
    texts = texts_of(made, tokenizer)
    assert [text.count("[") for text in texts] == [2, 1, 1]
    assert made.info["agent/contexts"] == 3.0
    letters = [tokenizer.encode(c)[0] for c in "abc"]
    for context in contexts_of(made)[1:]:
        tokens = made.tokens[context].tolist()
        at = next(i for i in range(len(tokens)) if tokens[i : i + 3] == letters)
        assert at, "what was sampled stays as it was sampled, also where it is only read"
    assert texts[2].startswith("<|im_start|>system\nnew<|im_end|>\n<|im_start|>user\nhi<|im_end|>")


def test_thoughts_that_the_template_takes_out_of_the_history_begin_a_new_context(tmp_path: Path) -> None:
    tokenizer = agents_tokenizer(tmp_path, FORGETFUL)
    engine = ScriptedEngine(tokenizer, ["<think>\nabc\n</think>\n\nabc", "<think>\nhm\n</think>\n\nhi", "z"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        messages: list[Any] = [USER]
        for expected in ("abc", "hi", "z"):
            message = (await ask(client, messages)).message
            assert message.content == expected
            assert bool(getattr(message, "reasoning_content", "")) == (expected != "z")
            messages += [message, USER]

    made = played(engine, talk)
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(made, tokenizer) == [
        f"{start}[<think>\nabc\n</think>\n\nabc<|im_end|>]",
        f"{start}abc<|im_end|>\n{start}[<think>\nhm\n</think>\n\nhi<|im_end|>]",
        f"{start}abc<|im_end|>\n{start}hi<|im_end|>\n{start}[z<|im_end|>]",
    ]


def test_another_attempt_at_the_same_prompt_is_another_sample(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["abc", "hi", "z"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        for _ in range(3):
            await ask(client, [USER])

    made = played(engine, talk)
    assert len(made.contexts) == 2
    assert len({tuple(request.tokens) for request in engine.asked}) == 1
    assert len({request.seed for request in engine.asked}) == 3, "equal noise would give equal answers"
    assert len({request.session for request in engine.asked}) == 3


def test_agents_that_speak_at_once_have_a_context_each(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    engine = ScriptedEngine(tokenizer, lambda history: "abc" if history.count("assistant") == 1 else "hi")

    async def talk(client: openai.AsyncOpenAI) -> None:
        first = (await ask(client, [USER], extra_body={"agent": "planner"})).message
        engine.gate = gate
        asked = [asyncio.ensure_future(ask(client, [USER, first, USER])) for _ in range(3)]
        while len(engine.running) < 3:
            await asyncio.sleep(0.001)
        gate.set()
        said = await asyncio.gather(*asked)
        await ask(client, [USER, first, USER, said[0].message, USER])

    made = played(engine, talk)
    assert sorted(text.count("[") for text in texts_of(made, tokenizer)) == [1, 2, 2]
    assert [turn.agent for turn in made.turns if turn.agent] == ["planner"]


def test_whatever_agents_do_the_model_sees_what_the_template_writes(tokenizer: Tokenizer) -> None:
    """Random agents that go on, go back, edit and ask at once; each history is the rendering of its messages."""
    for seed in range(12):
        random = Random(seed)
        engine = ScriptedEngine(
            tokenizer,
            lambda history, r=random: r.choice(["abc", "hi", "a b", CALL, f"so: {CALL}"]),  # type: ignore[misc]
        )
        requests: list[tuple[list[Any], list[Any]]] = []

        async def talk(client: openai.AsyncOpenAI, random: Random = random, requests: list[Any] = requests) -> None:
            histories: list[list[Any]] = [[USER]]
            for _ in range(6):
                chosen = [random.choice(histories) for _ in range(random.choice([1, 1, 3]))]
                tools = [WEATHER] if random.random() < 0.7 else []
                requests.extend((list(history), tools) for history in chosen)
                said = await asyncio.gather(*(ask(client, h, tools=tools or openai.NOT_GIVEN) for h in chosen))
                for history, choice in zip(chosen, said, strict=True):
                    message = choice.message.model_dump(exclude_none=True)
                    more = {"role": "user", "content": random.choice(["abc", "x<|im_end|>y", "hi hi"])}
                    if calls := message.get("tool_calls"):
                        more = {"role": "tool", "content": "sun", "tool_call_id": calls[0]["id"]}
                    histories.append([*history, message, more])

        made = played(engine, talk)
        assert len(made.turns) == len(requests) == len(engine.asked)
        seen = sorted("".join(tokenizer.decode(r.tokens, special=True).split()) for r in engine.asked)
        written = [tokenizer.render([_objects(m) for m in messages], tools=tools) for messages, tools in requests]
        assert seen == sorted("".join(text.split()) for text in written)


def _objects(message: Any) -> Any:
    """A message as a template takes it, its calls' arguments as objects."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {"content": "", **message, "tool_calls": calls}


# ------------------------------------------------------------------------------------------------ the interface


def test_log_probs_and_tokens_are_those_that_were_sampled(tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["aü", "aü"])

    async def talk(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(
            model="policy", messages=[USER], logprobs=True, extra_body={"return_token_ids": True}
        )
        entries = answer.choices[0].logprobs.content
        ids = answer.choices[0].token_ids
        assert ids == [*tokenizer.encode("aü"), tokenizer.eos_id]
        start = len(engine.asked[0].tokens)
        assert [entry.logprob for entry in entries] == [-0.25 * (1 + (start + i) % 4) for i in range(len(ids))]
        assert answer.prompt_token_ids == list(engine.asked[0].tokens)
        assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
            "prompt_tokens": start, "completion_tokens": len(ids), "total_tokens": start + len(ids),
        }  # fmt: skip
        text, last = "", None
        async for chunk in await client.chat.completions.create(
            model="policy", messages=[USER], stream=True, logprobs=True, stream_options={"include_usage": True}
        ):
            last = chunk
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == "aü"
        assert last.usage.completion_tokens == len(ids)

    played(engine, talk)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n": 2}, "n"),
        ({"top_p": 0.9}, "top_p"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 0}, None),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"stop_token_ids": [-4]}}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0]",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"extra_body": {"chat_template_kwargs": {"unheard": 1}}}, None),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    tokenizer: Tokenizer, given: dict[str, Any], named: str | None
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "policy", "messages": [USER], **given})
        assert refused.value.param == named
        assert refused.value.type == "invalid_request_error"
        await ask(client, [USER])

    engine = ScriptedEngine(tokenizer, ["abc"])
    assert len(played(engine, talk).turns) == 1


def test_neutral_and_advisory_parameters_are_taken(tokenizer: Tokenizer) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        await ask(
            client, [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, USER],
            n=1, top_p=1.0, presence_penalty=0, seed=3, user="me", store=False, parallel_tool_calls=False,
            tools=[WEATHER], tool_choice="none", max_completion_tokens=9, metadata={"a": "b"},
        )  # fmt: skip

    (text,) = texts_of(played(ScriptedEngine(tokenizer, [CALL]), talk), tokenizer)
    assert "<|im_start|>system\nbe brief<|im_end|>" in text


@pytest.mark.parametrize(
    ("temperature", "split", "recorded"), [(0.5, "train", 0.5), (None, "train", 0.0), (0, "eval", -1)]
)
def test_a_turns_own_temperature_is_recorded(
    tokenizer: Tokenizer, temperature: Any, split: Any, recorded: float
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        await ask(client, [USER], temperature=temperature)

    engine = ScriptedEngine(tokenizer, ["abc"])
    assert [turn.temperature for turn in played(engine, talk, split=split).turns] == [recorded]
    assert engine.asked[0].params.temperature == (1.0 if temperature is None else temperature)


def test_other_addresses_and_keys_are_refused_in_openais_form(tokenizer: Tokenizer) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        name, secret = client.api_key.removeprefix("ar-").split("-", 1)
        for key in ("", "x", f"ar-{name}", f"ar-{name}-", f"ar-{name}-{secret}x", f"ar-00-{secret}", "ar-é-ü"):
            with pytest.raises((openai.AuthenticationError, openai.APIConnectionError, UnicodeEncodeError)):
                await ask(client.with_options(api_key=key), [USER])
        with pytest.raises(openai.NotFoundError, match="only POST /v1/chat/completions"):
            await client.responses.create(model="policy", input="hi")
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            await client.models.retrieve("other")
        assert [model.id async for model in client.models.list()] == ["policy"]
        for body in (b"{", b"[]", b'{"messages": "\xff"}', b"[" * 100_000):
            answer = await client._client.post(
                f"{client.base_url}chat/completions",
                content=body,
                headers={"Authorization": f"Bearer {client.api_key}"},
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"

    assert played(ScriptedEngine(tokenizer, []), talk).turns == ()


def test_a_body_that_is_too_large_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.generator.endpoint.MOST_BODY_BYTES", 1000)

    async def talk(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            await ask(client, [{"role": "user", "content": "x" * 2000}])
        assert refused.value.status_code == 413

    played(ScriptedEngine(tokenizer, []), talk)


# ------------------------------------------------------------------------------------------------ ends


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


def test_an_agent_that_raises_when_its_turns_are_used_up_ends_the_episode_at_the_turn_limit(
    tokenizer: Tokenizer,
) -> None:
    async def talk(client: openai.AsyncOpenAI) -> None:
        while True:
            await ask(client, [USER])

    made = played(ScriptedEngine(tokenizer, lambda _: "abc"), talk, max_turns=3)
    assert (made.ended, made.reward, len(made.turns)) == ("turn_limit", 0.0, 3)


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


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked for the loopback."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
