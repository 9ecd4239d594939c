"""The contexts of one episode: the sequences that the model saw, and the columns of the trajectory that they become.

Most episodes have one. The tokens of a trajectory are those of its contexts, one context after another in the order in
which they were opened, so a context can go on at any time, also while another one is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from numpy.typing import NDArray

from async_rl.generator.chat import Chat
from async_rl.generator.engine import Completion
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Utterance
from async_rl.trajectory import Trajectory, Turn, VersionSpan

STOPS = "turns_stopped"
"""info of an unfinished trajectory: for each turn 1 when it ended by a stop, x when it was given up, else 0"""
WHOLE = -1
"""number of a given turn (start.py), which is none of its context's turns"""
_STOPPED = {"stop": "1", "aborted": "x"}


class Context(Struct, eq=False, kw_only=True):
    """One sequence for the model. Tokens are only ever appended."""

    number: int
    """in the order in which the episode opened them"""
    key: int
    """for the engine, which may keep its KV cache between turns"""
    seed: int
    """of its sampling, 64 bits unsigned"""
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    """tokens that it began with"""
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    """of the weights that sampled each token; -1 where it was not sampled"""
    turns: list[Turn] = field(default_factory=list)
    """with starts in `tokens`"""
    stops: str = ""
    """of each turn: 1 when it ended by a stop, x when it was given up, else 0"""
    chat: Chat | None = None
    """what was said in it as messages; None where its prompt is text"""
    busy: bool = False
    """a turn is being sampled"""
    truncated: bool = False
    """it is full"""
    unwanted: bool = False
    """nobody waits for its turn any more"""
    given: bool = False
    """it holds turns that were given to the episode (start.py)"""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens that were not sampled."""
        self.tokens = [*self.tokens, *tokens]  # a new list: an engine may hold the old one
        self.log_probs.extend([0.0] * len(tokens))
        self.versions.extend([-1] * len(tokens))

    def add_turn(self, completion: Completion, state_key: int, agent: str, temperature: float) -> None:
        """Append a sampled turn. `temperature`: as `Turn.temperature` records it."""
        start, length = len(self.tokens), len(completion.tokens)
        turn = Turn(start=start, length=length, state_key=state_key, agent=agent, temperature=temperature)
        self.turns.append(turn)
        self.tokens = [*self.tokens, *completion.tokens]
        self.log_probs.extend(completion.log_probs)
        self.versions.extend(completion.versions)
        self.stops += _STOPPED.get(completion.finish, "0")


@lru_cache(maxsize=16)
def first_tokens(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """Tokens of a text that is a whole prompt, which all samples of a group begin with. Raises ValueError."""
    return tuple(tokenizer.encode(text, first=True))


class Spoken(Struct, frozen=True, eq=False, gc=False):
    """A turn, of which an `Utterance` is made when a task asks."""

    context: Context
    number: int
    """of the turn in the context, or WHOLE"""
    text: str
    tokens: Sequence[int]
    agent: str

    def utterance(self) -> Utterance:
        return Utterance(text=self.text, tokens=() if self.number == WHOLE else tuple(self.tokens), agent=self.agent)


class Columns(Struct, frozen=True, eq=False, kw_only=True):
    """The contexts of an episode, laid out as a trajectory has them."""

    tokens: NDArray[np.int32]  # [tokens]
    log_behaviour: NDArray[np.float32]  # [tokens]
    turns: tuple[Turn, ...]
    versions: tuple[VersionSpan, ...]
    contexts: tuple[int, ...]
    stops: str


def lay_out(contexts: Sequence[Context]) -> Columns:
    """The columns of a trajectory. Contexts in which nothing was sampled or given are left out, unless that is all of
    them: then the first one is kept."""
    if len(contexts) == 1:
        only = contexts[0]
        return Columns(
            tokens=np.array(only.tokens, dtype=np.int32),
            log_behaviour=np.array(only.log_probs, dtype=np.float32),
            turns=tuple(only.turns),
            versions=_spans(only.versions),
            contexts=(),
            stops=only.stops,
        )
    spoken = [context for context in contexts if context.turns or context.given] or list(contexts[:1])
    turns: list[Turn] = []
    starts: list[int] = []
    tokens: list[int] = []
    log_probs: list[float] = []
    versions: list[int] = []
    for context in spoken:
        start = len(tokens)
        starts.append(start)
        turns += [replace(turn, start=turn.start + start) for turn in context.turns] if start else context.turns
        tokens += context.tokens
        log_probs += context.log_probs
        versions += context.versions
    return Columns(
        tokens=np.asarray(tokens, dtype=np.int32),
        log_behaviour=np.asarray(log_probs, dtype=np.float32),
        turns=tuple(turns),
        versions=_spans(versions),
        contexts=tuple(starts[1:]),
        stops="".join(context.stops for context in spoken),
    )


def _spans(versions: Sequence[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions; environment tokens (-1) between two runs of one version do not split it."""
    found = {*versions}
    found.discard(-1)
    if not found:
        return ()
    if len(found) == 1:  # as nearly always
        only = found.pop()
        return (VersionSpan(version=only, start=versions.index(only), end=len(versions) - versions[::-1].index(only)),)
    spans: list[VersionSpan] = []
    now, start, end = -1, 0, 0
    for position, version in enumerate(versions):
        if version >= 0:
            if version != now:
                if now >= 0:
                    spans.append(VersionSpan(version=now, start=start, end=end))
                now, start = version, position
            end = position + 1
    if now >= 0:
        spans.append(VersionSpan(version=now, start=start, end=end))
    return tuple(spans)


class RecordedTurns:
    """The turns of a recorded episode: what a lost generator sampled of it, or all of it, played again. Each answers
    one request: the first one whose history is that behind which the turn was sampled."""

    def __init__(self, record: Trajectory) -> None:
        self._record = record
        self._stops = str(record.info.get(STOPS, ""))
        self.broken = len(self._stops) != len(record.turns)
        """the record is not that of an unfinished episode"""
        starts = np.asarray([0, *record.contexts])
        begins = starts[np.searchsorted(starts, [turn.start for turn in record.turns], side="right") - 1]
        # number of a turn -> start of its context. A turn that was given up was no answer
        self._left = {n: int(begin) for n, begin in enumerate(begins) if self._stops[n : n + 1] != "x"}
        versions = np.full(len(record.tokens), -1, np.int64)
        for span in record.versions:
            versions[span.start : span.end] = span.version
        self._versions = versions

    def __len__(self) -> int:
        """Turns that nobody came to yet."""
        return len(self._left)

    def take(self, history: Sequence[int], room: int, temperature: float) -> Completion | None:
        """The turn behind `history`, where there is one of at most `room` tokens sampled at `temperature` (as turns
        record it)."""
        for number in self.behind(history):
            turn = self._record.turns[number]
            if turn.length <= room and turn.temperature == temperature:
                return self.give(number, "stop" if self._stops[number] == "1" else "length")
        return None

    def behind(self, history: Sequence[int]) -> Iterator[int]:
        """Numbers of the turns behind `history` that answered no request yet."""
        record, known = self._record, list(history)
        for number, begin in self._left.items():
            start = record.turns[number].start
            if start - begin == len(known) and record.tokens[begin:start].tolist() == known:
                yield number

    def give(self, number: int, finish: Literal["stop", "length"]) -> Completion:
        """The turn as an answer; it answers no other request."""
        del self._left[number]
        record, turn = self._record, self._record.turns[number]
        taken = slice(turn.start, turn.start + turn.length)
        return Completion(
            tokens=record.tokens[taken].tolist(),
            log_probs=record.log_behaviour[taken].tolist(),
            versions=self._versions[taken].tolist(),
            finish=finish,
        )
