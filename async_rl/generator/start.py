"""What the answers of an episode begin with (`GivenStart`): turns, or the beginning of one, that nobody samples.

A whole turn answers a call of `generate` as if the policy had spoken it, so the environment goes its way; a part of one
stands before what the policy samples, and both are the turn's text. Either way the tokens are context without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from async_rl.generator.contexts import Context
from async_rl.generator.engine import Completion
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.problem_fields import value_of
from async_rl.task.protocol import Problem
from async_rl.trajectory.given import GIVEN, HINT, Given
from async_rl.wire.messages import Start

PIECE = "window"
"""source of a start that is an earlier piece of the same episode"""
OTHER_WAY = "the environment answered otherwise than in the episode's earlier piece, so the episode cannot go on"


class OtherWay(ValueError):
    """What an episode goes on from does not fit it."""


@dataclass(slots=True, eq=False)
class GivenStart:
    """Gives a permit's start to one episode, piece by piece."""

    start: Start
    pieces: list[tuple[list[int], list[int], bool]] = field(default_factory=list)
    """of each: the tokens before it, its own, and whether the policy goes on within it. Before a text of the data may
    stand anything: an empty list"""
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """what was given, in the tokens of the context"""
    open: bool = False
    """the last of them was gone on with"""
    opened: Sequence[int] = ()
    """what was given of the turn that was asked for last"""

    def __post_init__(self) -> None:
        tokens: list[int] = np.frombuffer(self.start.tokens, "<i4").tolist()
        last = len(self.start.turns) - 1
        self.pieces = [
            (tokens[:begin], tokens[begin : begin + length], self.start.open and number == last)
            for number, (begin, length) in enumerate(self.start.turns)
        ]

    def begin(self, problem: Problem, tokenizer: Tokenizer) -> Problem:
        """The episode's problem is known; returns it, with the text in its prompt where that is its place. Raises
        ValueError where the data have no such text."""
        if not self.start.field or self.pieces:
            return problem
        text = value_of(problem, self.start.field)
        if not isinstance(text, str):
            raise ValueError(f"problem {problem.index} has no text in its field '{self.start.field}'")
        if self.start.in_prompt:
            return replace(problem, prompt=with_hint(problem.prompt, self.start, text))
        tokens = beginning_of(text, tokenizer, self.start.share)
        self.pieces = [([], tokens, True)] if tokens else []
        return problem

    def give(self, context: Context, room: int) -> Completion | None:
        """The next turn of a context with room for so many tokens, where it is given whole. What is given of its
        beginning stands in the context then, and in `opened`."""
        self.opened = ()
        if not self.pieces or context.number:
            return None
        before, tokens, is_open = self.pieces[0]
        if self.start.source == PIECE and (before != context.tokens or len(tokens) + is_open > room):
            raise OtherWay(OTHER_WAY)
        del self.pieces[0]
        if (before and before != context.tokens) or (not is_open and len(tokens) > room):
            self.pieces = []  # the environment went another way: the policy goes on by itself
            return None
        tokens = tokens[: room - 1] if is_open else tokens  # something is left to say
        if not tokens:
            return None
        self.stretches.append((len(context.tokens), len(tokens)))
        context.given = True
        context.extend(tokens)
        if is_open:
            self.opened, self.open = tokens, True
            return None
        return Completion(tokens=tokens, log_probs=[0.0] * len(tokens), versions=[-1] * len(tokens), finish="stop")

    @property
    def is_left_behind(self) -> bool:
        """Whether the episode did not come to where its earlier piece was cut."""
        return self.start.source == PIECE and bool(self.pieces)

    def record(self) -> Mapping[str, float | str]:
        """Notes of the trajectory. Its first context comes first, so that places in one are places in the other."""
        given = Given(stretches=tuple(self.stretches), open=self.open).write()
        return {GIVEN: given, HINT: self.start.share} if self.start.in_prompt else {GIVEN: given}


def with_given(start: GivenStart | None, sampled: Sequence[int]) -> Sequence[int]:
    """Tokens of the turn that was asked for last, with those that were given of it."""
    return [*start.opened, *sampled] if start is not None and start.opened else sampled


Prompt = str | Sequence[Mapping[str, Any]]


def with_hint(prompt: Prompt, start: Start, text: str) -> Prompt:
    """A prompt that ends with the instruction and the beginning of the text, cut between characters."""
    begun = text[: int(start.share * len(text))]
    if isinstance(prompt, str):
        return f"{prompt}{start.instruction}{begun}"
    last = prompt[-1]
    if not isinstance(last.get("content"), str):
        raise ValueError("the last message of the prompt is no text, behind which a hint could stand")
    said = [part for part in (last["content"], start.instruction, begun) if part]
    return [*prompt[:-1], {**last, "content": "\n\n".join(said)}]


def beginning_of(text: str, tokenizer: Tokenizer, share: float) -> list[int]:
    """The first `share` of the tokens of a text that an answer begins with."""
    tokens = tokenizer.encode(text, behind=True)
    return tokens[: int(share * len(tokens))]
