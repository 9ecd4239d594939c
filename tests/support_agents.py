"""Episodes that an agent plays through the endpoint, on an engine that says what a script says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
from support_tokenizers import ENDOFTEXT, IM_END, IM_START, byte_folder

from async_rl.generator.endpoint import Endpoint
from async_rl.generator.engine import Completion, Request
from async_rl.generator.places import Slots
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, make_tickets
from async_rl.generator.task_code import TaskGuard
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Problem, Task
from async_rl.task.protocol import Connection
from async_rl.trajectory import Split, Trajectory
from async_rl.wire.messages import Permit

HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools <tool_call>\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') | trim }}"
    "{% for c in m.get('tool_calls') or [] %}{{ '\\n<tool_call>\\n{\"name\": \"' + c.function.name }}"
    "{{ '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""a chat template with tools in the Hermes format; it strips what a message holds"""
FORGETFUL = HERMES.replace(
    "(m['content'] or '') | trim",
    "((m['content'] or '') if loop.last else (m['content'] or '').split('</think>')[-1]) | trim",
)
"""one that takes thoughts out of all messages but the last, as that of Qwen 3 does"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
MERGES = [("a", "b"), ("ab", "c"), ("h", "i")]
"""so that texts have several tokenisations"""


def agents_tokenizer(folder: Path, template: str = HERMES, **more: Any) -> Tokenizer:
    specials = (ENDOFTEXT, IM_START, IM_END)
    return Tokenizer(byte_folder(folder, specials=specials, merges=MERGES, template=template, **more))


Script = Callable[[str], str] | Sequence[str]


@dataclass
class ScriptedEngine:
    """Says what `script` says: a list with one text a turn, or a function from the history to a text. It samples bytes,
    never a merged token, and ends with the end token unless the text is longer than asked for."""

    tokenizer: Tokenizer
    script: Script
    version: int = 3
    max_context: int = 4000
    end: str = IM_END
    gate: asyncio.Event | None = None
    """turns wait for it"""
    asked: list[Request] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    running: dict[int, asyncio.Event] = field(default_factory=dict)
    shown: dict[int, list[int]] = field(default_factory=dict)
    """tokens so far of running turns"""

    async def generate(self, request: Request) -> Completion:
        if self.error is not None:
            raise self.error
        assert request.session not in self.running, "two turns of one context at once"
        history = self.tokenizer.decode(request.tokens, special=True)
        text = self.script(history) if callable(self.script) else self.script[len(self.asked)]
        self.asked.append(request)
        self.begun.set()
        tokens = [token for letter in text for token in self.tokenizer.encode(letter, behind=True)]
        tokens += self.tokenizer.encode(self.end, behind=True)
        given_up = self.running[request.session] = asyncio.Event()
        try:
            if self.gate is not None:
                waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, given_up)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
            else:
                await asyncio.sleep(0)
        finally:
            del self.running[request.session]
        if given_up.is_set():
            return self._completion(request, tokens[:2], "aborted")
        most = request.params.max_tokens
        for end in range(1, min(len(tokens), most) + 1):
            said = self.tokenizer.decode(tokens[:end], behind=True)
            if any(string in said for string in request.params.stop_strings):
                return self._completion(request, tokens[:end], "stop")
        return self._completion(request, tokens[:most], "stop" if len(tokens) <= most else "length")

    def _completion(self, request: Request, tokens: list[int], finish: Any) -> Completion:
        start = len(request.tokens)
        log_probs = [-0.25 * (1 + (start + i) % 4) for i in range(len(tokens))]
        return Completion(tokens=tokens, log_probs=log_probs, versions=[self.version] * len(tokens), finish=finish)

    async def probe(self, tokens: Sequence[int]) -> Sequence[float]:
        return [-float(token) for token in tokens[1:]]

    def sampled(self, session: int) -> Sequence[int]:
        return self.shown.get(session, ())

    def release(self, session: int) -> None:
        if session in self.running:
            self.running[session].set()


Play = Callable[[Problem, Any], Awaitable[float]]


class Played(Task):
    """A task whose rollout is a function."""

    name = "played"

    def __init__(self, rollout: Play, prompt: Any = ({"role": "user", "content": "hi"},), **fields: Any) -> None:
        super().__init__()
        self.play = rollout
        self.problem = Problem(index=0, prompt=prompt, **fields)

    def problems(self, split: Split) -> Sequence[Problem]:
        return [self.problem]

    async def rollout(self, problem: Problem, session: Any) -> float:
        return await self.play(problem, session)


async def play(
    engine: Any,
    tokenizer: Tokenizer,
    task: Any,
    *,
    split: Split = "train",
    sample: int = 0,
    endpoint: Endpoint | None = None,
    record: Trajectory | None = None,
    max_turns: int = 20,
    timeout_s: float = 20.0,
    slots: Mapping[str, int] | Slots | None = None,
    saved: list[Trajectory] | None = None,
    limit_s: float = 0.0,
) -> Trajectory:
    """One episode."""
    permit = Permit(group=0, problem=0, split=split, samples=(sample,), seed=5, temperature=1.0)
    (ticket,) = make_tickets(permit)
    agents = endpoint or Endpoint()
    session = EpisodeSession(
        engine=engine,
        tokenizer=tokenizer,
        ticket=ticket,
        session_id=1 + sample,
        max_context=engine.max_context,
        max_turns=max_turns,
        agents=agents,
        record=record,
        slots=slots if isinstance(slots, Slots) else Slots(slots or {}),
        on_turn=None if saved is None else lambda: saved.append(session.so_far()),
    )
    try:
        made = await run_episode(task, session, ticket, timeout_s=timeout_s, guard=TaskGuard(limit_s=limit_s))
    finally:
        if endpoint is None:
            await agents.shut()
    assert made.check() is None
    return made


def contexts_of(made: Trajectory) -> list[slice]:
    """Where the contexts of a trajectory lie in its tokens."""
    edges = [0, *made.contexts, len(made.tokens)]
    return [slice(a, b) for a, b in pairwise(edges)]


def texts_of(made: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """The text of each context, with the turns in brackets."""
    found = []
    for context in contexts_of(made):
        text, at = "", context.start
        for turn in made.turns:
            if context.start <= turn.start < context.stop:
                end = turn.start + turn.length
                text += tokenizer.decode(made.tokens[at : turn.start].tolist(), special=True, behind=True)
                text += f"[{tokenizer.decode(made.tokens[turn.start : end].tolist(), special=True, behind=True)}]"
                at = end
        text += tokenizer.decode(made.tokens[at : context.stop].tolist(), special=True, behind=True)
        found.append(text)
    return found


def sampled_as(made: Trajectory, engine: ScriptedEngine) -> None:
    """Every turn has the tokens, log-probs and versions that the engine sampled, behind the history that it saw."""
    seen = {tuple(request.tokens) for request in engine.asked}
    for context in contexts_of(made):
        for turn in made.turns:
            if context.start <= turn.start < context.stop:
                assert tuple(made.tokens[context.start : turn.start].tolist()) in seen
                start = turn.start - context.start
                expected = [-0.25 * (1 + (start + i) % 4) for i in range(turn.length)]
                assert made.log_behaviour[turn.start : turn.start + turn.length].tolist() == expected
    outside = np.ones(len(made.tokens), bool)
    outside[made.policy_positions()] = False
    assert not made.log_behaviour[outside].any()


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
