"""What a task is: its problems, how one episode goes, how it is rewarded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from async_rl.trajectory import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem. `prompt` is raw text, or chat messages (`{"role": ..., "content": ...}`, and what else the template
    knows: `tool_calls`, `name`, ...) for the tokenizer's chat template."""

    index: int
    """position in `Task.problems(split)`"""
    prompt: str | Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    """what the rollout and the reward need: the answer, the secret, ..."""
    tools: Sequence[Mapping[str, Any]] = ()
    """descriptions of tools for the chat template"""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """further variables of the chat template, e.g. `{"enable_thinking": False}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What `Session.score` found."""

    log_probs: Sequence[float]
    """of each token of the text, at temperature 1, nats"""
    version: int
    """of the weights that computed them"""

    @property
    def total(self) -> float:
        """Log-prob of the whole text, nats."""
        return math.fsum(self.log_probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How an agent reaches its episode. Example: `openai.AsyncOpenAI(base_url=c.base_url, api_key=c.api_key)`."""

    base_url: str
    """ends in /v1; on the loopback"""
    api_key: str
    """of this episode alone"""
    model: str
    """name to give as `model`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a demonstration; `policy` says whether the model should learn to produce it."""

    text: str
    policy: bool


class Session(Protocol):
    """One running episode as a task sees it. Tokens are only ever appended; nothing is re-tokenised."""

    @property
    def turn(self) -> int:
        """Turns generated so far."""
        ...

    @property
    def truncated(self) -> bool:
        """True when the context is full: the last turn was cut by it and no further one is possible."""
        ...

    @property
    def stopped(self) -> bool:
        """True when the last turn ended at a stop string or the end of text, not at a token limit."""
        ...

    @property
    def split(self) -> Split:
        """Whether the episode trains or evaluates."""
        ...

    @property
    def seed(self) -> int:
        """Seed of this episode's own randomness, 63 bits: another one for every sample of a problem, the same when the
        episode is played again."""
        ...

    async def generate(
        self,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        state_key: int = -1,
        temperature: float | None = None,
        stop_tokens: Sequence[int] = (),
        agent: str = "",
    ) -> str:
        """Let the policy speak one turn and return its text: special tokens included, up to the stop string that ended
        it and with it, without the end token. (The token that completes a stop string may go on behind it: the history
        has it as it was sampled, the text does not.)

        It ends at a stop string, at a token that the model folder names as an end, at one of `stop_tokens`, or after
        `max_tokens` tokens.

        Args:
            state_key: non-negative hash of the environment state, for recipes that compare equal states.
            temperature: of this turn; None: the episode's. It is recorded, and the trainer computes log-probs of the
                turn at it. Must be above 0 where the episode trains.
            agent: who speaks, where an episode has several agents.
        """
        ...

    def append(self, text: str) -> None:
        """Append environment text. These tokens carry no loss."""
        ...

    def append_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Append chat messages (user, tool, ...) as the chat template writes them behind what is there, and the header
        of the next assistant turn. These tokens carry no loss.

        Raises ValueError where the template would write the history before them differently (then only a new context,
        `start_context`, holds what the model is meant to see).
        """
        ...

    def start_context(self, prompt: str | Sequence[Mapping[str, Any]]) -> None:
        """Begin a new context of this episode with `prompt`, text or chat messages: what follows does not see what was
        before. For agents that edit or summarise their history, and for several agents in one episode."""
        ...

    async def score(self, text: str) -> Score:
        """Log-probs of `text` behind the current context, under the weights of a stated version; the episode's history
        stays as it is."""
        ...

    def openai(self) -> Connection:
        """Base URL and key of an OpenAI-compatible endpoint through which any agent can play this episode. What it
        samples is recorded token by token, as by `generate`. The key is valid until the episode ends."""
        ...

    def reward_turn(self, value: float) -> None:
        """Reward of the turn generated last; recipes with turn-level credit use it."""
        ...

    def end_at_turn_limit(self) -> None:
        """Record that the episode is over because its turns are used up."""
        ...

    def end_at_token_limit(self) -> None:
        """Record that the episode is over because an answer was cut by a token limit. (Where the context
        is full this is recorded by itself.)"""
        ...

    def note(self, key: str, value: float | str) -> None:
        """Attach a number or label to the trajectory (shown in reports)."""
        ...


Reward = float | Mapping[str, float]
"""a number, or named parts: each becomes a column, a metric and a curve; their weights are `task.reward_weights`"""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """A task that has nothing to set."""


class Task:
    """Where work comes from. A task of one's own derives from this class and needs `problems` and `rollout` only.

    A task is deterministic: the same settings give the same problems in every process and after every restart.

    Example:
        class Echo(Task):
            @dataclass(frozen=True, kw_only=True)
            class Settings:
                words: int = 100

            def problems(self, split):
                return [Problem(index=i, prompt=f"say {i}:") for i in range(self.settings.words)]

            async def rollout(self, problem, session):
                text = await session.generate(max_tokens=8, stop=(".",))
                return float(text.strip(" .") == str(problem.index))
    """

    name: str = ""
    """what messages and records call the task; make_task fills in an empty one"""
    single_turn: bool = False
    """True when every episode is one turn. Recipes with turn-level parts, which would do nothing then, are refused."""
    example_call: str = ""
    """a call that the task's tool answers, for rehearsals with a model that would never write one"""

    Settings: type[Any] = NoSettings
    """a dataclass whose fields have types and defaults: what `task.args` may hold in a config"""

    def __init__(self, settings: Any = None) -> None:
        """`settings`: an instance of the class's `Settings`, checked."""
        self.settings = settings

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; `len()` and indexing must be cheap. Splits do not overlap."""
        raise NotImplementedError

    async def rollout(self, problem: Problem, session: Session) -> Reward:
        """Run one episode (the prompt is already in the session) and return its reward: a number, or named parts, of
        which the reward is the sum, weighted by `task.reward_weights`.

        May raise: the trajectory then ends with the reason and the run goes on."""
        raise NotImplementedError

    @classmethod
    def has_demonstrations(cls) -> bool:
        """True when the class defines `demonstration`, and `async-rl init-model` can warm a model up with it."""
        return cls.demonstration is not Task.demonstration

    @property
    def alphabet(self) -> str:
        """Every character that can occur in an episode. Defined together with `demonstration`."""
        raise NotImplementedError

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """One fair episode for `problem`, prompt first. Optional; an answer alone does not say how it is found."""
        raise NotImplementedError
