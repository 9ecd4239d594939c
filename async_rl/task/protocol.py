"""What a task is: its problems, how one episode goes, how it is rewarded."""

from __future__ import annotations

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

    async def generate(self, *, max_tokens: int, stop: Sequence[str] = (), state_key: int = -1) -> str:
        """Let the policy speak one turn and return its text: special tokens included, up to the stop string that ended
        it and with it, without the end token. (The token that completes a stop string may go on behind it: the history
        has it as it was sampled, the text does not.)

        It ends at a stop string, at a token that the model folder names as an end, or after `max_tokens` tokens.
        `state_key`: non-negative hash of the environment state, for recipes that compare equal states.
        """
        ...

    def append(self, text: str) -> None:
        """Append environment text. These tokens carry no loss."""
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

    async def rollout(self, problem: Problem, session: Session) -> float:
        """Run one episode (the prompt is already in the session) and return its reward.

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
