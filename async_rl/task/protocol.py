"""What a task is. A task is a small file: its problems, how one episode goes, how it is rewarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from async_rl.trajectory import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem. `prompt` is raw text, or chat messages (`{"role": ..., "content": ...}`) for the
    tokenizer's chat template."""

    index: int
    """position in `Task.problems(split)`"""
    prompt: str | Sequence[Mapping[str, str]]
    data: Mapping[str, Any] = field(default_factory=dict)
    """what the rollout and the reward need: the answer, the secret, ..."""


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
        """Let the policy speak one turn and return its text (a stop string included).

        It ends at a stop string, at the tokenizer's end-of-text token or after `max_tokens` tokens.
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


class Task(Protocol):
    """Where work comes from. Deterministic: the same settings give the same problems everywhere."""

    name: str

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; `len()` and indexing must be cheap. Splits do not overlap."""
        ...

    async def rollout(self, problem: Problem, session: Session) -> float:
        """Run one episode (the prompt is already in the session) and return its reward.

        May raise: the trajectory then ends with the reason and the run goes on."""
        ...


class Demonstrator(Protocol):
    """A task that can also show how it is done (used by `async-rl init-model`)."""

    @property
    def alphabet(self) -> str:
        """Every character that can occur in an episode."""
        ...

    def demonstration(self, problem: Problem, random: Random) -> list[Segment]:
        """One fair episode for `problem`, prompt first."""
        ...
