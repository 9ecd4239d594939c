"""Agents that play episodes through the endpoint, with OpenAI's own client: what they send is matched to what was
sampled, token by token, and every episode ends in one trajectory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from support_agents import (
    FORGETFUL,
    WEATHER,
    ScriptedEngine,
    agents_tokenizer,
    ask,
    contexts_of,
    played,
    texts_of,
)

from async_rl.generator.engine import Completion, Request
from async_rl.model.tokenizer import Tokenizer

USER = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "get_weather",  "arguments": {"city":   "abc"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


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


Pieces = list[tuple[str, str]]
"""(what is sampled, what a stream tells of it at once)"""


class Speaking(ScriptedEngine):
    """Samples its turn in pieces: the next one when that before has been told."""

    def say(self, pieces: Pieces) -> None:
        self.pieces, self.told = pieces, asyncio.Semaphore(0)

    async def generate(self, request: Request) -> Completion:
        said = ""
        for sampled, told in self.pieces:
            said += sampled
            self.shown[request.session] = [t for letter in said for t in self.tokenizer.encode(letter, behind=True)]
            if told:
                await self.told.acquire()
        del self.shown[request.session]
        self.script = lambda history: said
        return await super().generate(request)


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        ([("It is", "It is"), (" 4 °", " 4 °"), ("C.\nUs", "C."), ("er: no", "")], 0),
        ([("<thi", ""), ("nk>\nhm", "hm"), (" so\n</th", " so"), ("ink>\n\nIt is", "It is")], 0),
        ([("Let me", "Let me"), (f" see.\n{CALL[:5]}", " see."), (CALL[5:], "")], 1),
    ],
)
def test_a_stream_tells_each_piece_before_the_next_is_sampled(tokenizer: Tokenizer, pieces: Pieces, calls: int) -> None:
    engine = Speaking(tokenizer, [])
    engine.say(pieces)

    async def talk(client: openai.AsyncOpenAI) -> None:
        found, called, finish = [], 0, []
        async for chunk in await client.chat.completions.create(
            model="policy", messages=[USER], tools=[WEATHER], stop=["\nUser:"], stream=True
        ):
            (choice,) = chunk.choices
            called += len(choice.delta.tool_calls or ())
            finish += [choice.finish_reason] if choice.finish_reason else []
            said = choice.delta.content or (choice.delta.model_extra or {}).get("reasoning_content")
            if said:
                found.append(said)
                engine.told.release()
        assert (found, called) == ([told for _, told in pieces if told], calls)
        assert finish == ["tool_calls" if calls else "stop"]

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


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked for the loopback."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
