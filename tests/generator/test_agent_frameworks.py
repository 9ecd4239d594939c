"""Agent frameworks that nobody here wrote, played through the endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support_agents import Played, ScriptedEngine, agents_tokenizer, play, sampled_as, texts_of

from async_rl.model.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "get_weather",  "arguments": {"city":   "abc"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_ai_with_tools_and_a_second_question(tokenizer: Tokenizer, stream: bool) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    asked: list[str] = []

    async def rollout(problem: Any, session: Any) -> float:
        connection = session.openai()
        provider = OpenAIProvider(base_url=connection.base_url, api_key=connection.api_key)
        agent = pydantic_ai.Agent(OpenAIChatModel(connection.model, provider=provider), instructions="Be brief.")

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """The weather of a city."""
            asked.append(city)
            return "sunny"

        if stream:
            async with agent.run_stream("Weather?") as result:
                first = await result.get_output()
            history = result.all_messages()
        else:
            result = await agent.run("Weather?")
            first, history = result.output, result.all_messages()
        second = await agent.run("And tomorrow?", message_history=history)
        return float((first, second.output) == ("It is abc.", "hi"))

    said = CALL if stream else f"Let me see.\n{CALL}"  # text ends its streams
    engine = ScriptedEngine(tokenizer, [said, "It is abc.", "hi"])
    made = asyncio.run(play(engine, tokenizer, Played(rollout)))
    assert (made.ended, made.reason, made.reward, asked) == ("finished", "", 1.0, ["abc"])
    (text,) = texts_of(made, tokenizer)
    assert f"[{said}<|im_end|>]\n<|im_start|>tool\nsunny<|im_end|>" in text
    assert "[It is abc.<|im_end|>]\n<|im_start|>user\nAnd tomorrow?" in text
    sampled_as(made, engine)


def test_smolagents_in_a_thread_which_tells_its_history_in_its_own_words(tokenizer: Tokenizer) -> None:
    smolagents = pytest.importorskip("smolagents")
    code = "Thought: easy\n<code>\nfinal_answer(2 + 2)\n</code>"

    def agent(connection: Any) -> float:
        model = smolagents.OpenAIModel(connection.model, api_base=connection.base_url, api_key=connection.api_key)
        agent = smolagents.CodeAgent(tools=[], model=model, max_steps=3, verbosity_level=0)
        return float(agent.run("What is 2 + 2?") == 4)

    async def rollout(problem: Any, session: Any) -> float:
        return await asyncio.to_thread(agent, session.openai())

    engine = ScriptedEngine(tokenizer, ["Thought: hm\n<code>\nprint('abc')\n</code>", code], max_context=40_000)
    made = asyncio.run(play(engine, tokenizer, Played(rollout)))
    assert (made.ended, made.reason, made.reward, len(made.turns)) == ("finished", "", 1.0, 2)
    sampled_as(made, engine)


def test_an_agent_in_a_process_of_its_own_that_dies(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The record ends where the agent ended; the episode ends as its task wants it."""
    program = tmp_path / "agent.py"
    program.write_text(
        "import os, openai, signal\n"
        "client = openai.OpenAI()\n"  # address and key are in the environment
        "ask = lambda: client.chat.completions.create(model='policy', messages=[{'role': 'user', 'content': 'hi'}])\n"
        "ask(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    async def rollout(problem: Any, session: Any) -> float:
        import os
        import sys

        connection = session.openai()
        environment = {**os.environ, "OPENAI_BASE_URL": connection.base_url, "OPENAI_API_KEY": connection.api_key}
        agent = await asyncio.create_subprocess_exec(sys.executable, str(program), env=environment)
        return float(await agent.wait())

    engine = ScriptedEngine(tokenizer, ["abc"])
    made = asyncio.run(play(engine, tokenizer, Played(rollout)))
    assert (made.ended, made.reward, len(made.turns)) == ("finished", -9.0, 1)
