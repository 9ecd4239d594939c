"""The record of one episode: `Trajectory`, with everything that a correction of the objective needs.

Also here, because they depend on a trajectory's numbers alone: the seeds and the buckets of length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

Split = Literal["train", "eval"]
Ended = Literal["finished", "length", "turn_limit", "error", "aborted", "window"]
"""How an episode ended: by itself; at the token limit; at the turn limit; because the task or the reward raised or
returned NaN; because the engine gave the request up. "window": it did not end; this piece of it did
(`rollout.window`), and another trajectory goes on where it was cut."""
GREEDY = -1.0
"""`Turn.temperature` of a turn that took the likeliest tokens in an episode that otherwise samples"""
MOST_REWARD = 1e15
"""size of a reward, at most: the squares of a batch's sum to a float32"""
LOWEST_TEMPERATURE = 0.01
"""of turns that are not greedy. Below it vLLM samples at this one, and log-probs would be those of another policy"""
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_FEW = 128
"""tokens: in so many Python finds the policy's faster than numpy"""


class Turn(Struct, frozen=True, kw_only=True, gc=False):
    """Contiguous tokens sampled by the policy between two environment messages.

    Example: `Turn(start=12, length=3)` covers `tokens[12:15]`.
    """

    start: int
    """index of its first token in the trajectory"""
    length: int
    """tokens, >= 0"""
    reward: float = 0.0
    """reward that the environment gave for this turn alone"""
    state_key: int = -1
    """non-negative hash of the environment state in which the turn began; -1 when the task gives none"""
    agent: str = ""
    """who speaks, where an episode has several agents (players of a game, roles); empty: the only one"""
    temperature: float = 0.0
    """at which it was sampled, where that is not the trajectory's; 0: the trajectory's; `GREEDY` in evaluation alone.
    Log-probs of greedy turns are those of temperature 1. `turn_temperature` gives what to record"""
    notes: tuple[tuple[str, float], ...] = ()
    """(name, number) that the task gave to the turn, in order of names, each once"""
    token_notes: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(name, one number for each of its tokens, float32), alike; none on a turn without tokens"""


class VersionSpan(Struct, frozen=True, kw_only=True, gc=False):
    """The policy tokens at positions `start <= position < end` were sampled by weights of `version`."""

    version: int
    start: int
    end: int


class Trajectory(Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """One episode. Policy tokens are exactly those inside `turns`; all others came from the prompt or the environment
    and carry no loss.

    A msgspec struct rather than a dataclass, because one is made for every episode that arrives; to change fields,
    use `msgspec.structs.replace(trajectory, reward=1.0)`.
    """

    group: int
    """identity of the group (admission number, unique in a run)"""
    sample: int
    """index within the group"""
    problem: int
    """index into the task's problems of this split"""
    split: Split
    seed: int
    """seed of this trajectory's sampling, 64 bits unsigned"""
    tokens: NDArray[np.int32]  # [tokens]
    log_behaviour: NDArray[np.float32]  # [tokens]
    """log-prob of each policy token under the distribution it was sampled from; 0 elsewhere"""
    turns: tuple[Turn, ...]
    """in order, disjoint"""
    versions: tuple[VersionSpan, ...]
    """in order, disjoint, together covering every policy token"""
    reward: float
    ended: Ended
    temperature: float = 1.0
    """at which its turns were sampled, those aside that have one of their own; 0: greedily"""
    contexts: tuple[int, ...] = ()
    """where further contexts begin in `tokens`, rising, the first (0) left out. A context is one sequence for the
    model: its tokens see, and are numbered from, the context's first token. An episode has several when an agent edits
    its history, or when several agents see different histories; tokens that a later context repeats lie in no turn
    there, so each sampled token is trained once"""
    reason: str = ""
    """why, when `ended` is "error" or "aborted" """
    generator: str = ""
    started_at: float = 0.0
    """seconds since the epoch"""
    finished_at: float = 0.0
    info: Mapping[str, float | str] = field(default_factory=dict)
    """numbers and labels of the task or a recipe (agent, parent and fork position, source, ...)"""

    @property
    def failed(self) -> bool:
        """Whether the episode broke; it is kept for the record and never trained."""
        return self.ended in ("error", "aborted")

    @property
    def num_policy_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum([turn.length for turn in self.turns])

    @property
    def version_min(self) -> int:
        """Version of the oldest policy token; -1 when the trajectory has none."""
        spans = self.versions
        return spans[0].version if len(spans) == 1 else min([span.version for span in spans], default=-1)

    @property
    def version_max(self) -> int:
        """Version of the newest policy token; -1 when the trajectory has none."""
        spans = self.versions
        return spans[0].version if len(spans) == 1 else max([span.version for span in spans], default=-1)

    def policy_positions(self) -> NDArray[np.int64]:  # [policy tokens]
        """Positions of the policy tokens, in order."""
        if len(self.turns) == 1:
            turn = self.turns[0]
            return np.arange(turn.start, turn.start + turn.length, dtype=np.int64)
        if len(self.tokens) <= _FEW:
            where = [position for t in self.turns for position in range(t.start, t.start + t.length)]
            return np.array(where, dtype=np.int64)
        return np.concatenate([np.arange(t.start, t.start + t.length, dtype=np.int64) for t in self.turns])

    def policy_versions(self) -> NDArray[np.int64]:  # [policy tokens]
        """Version of the weights that sampled each policy token, in order."""
        if len(self.versions) == 1:
            return np.full(self.num_policy_tokens, self.versions[0].version, dtype=np.int64)
        version = np.full(len(self.tokens), -1, dtype=np.int64)
        for span in self.versions:
            version[span.start : span.end] = span.version
        return version[self.policy_positions()]

    def context_bounds(self) -> Iterator[tuple[int, int]]:
        """Start and end of each context, the sequences that the model sees; together they are `tokens`."""
        return pairwise((0, *self.contexts, len(self.tokens)))

    def context_lengths(self) -> list[int]:
        """Tokens of each context."""
        return [end - start for start, end in self.context_bounds()]

    @property
    def longest_context(self) -> int:
        """Tokens of its longest context."""
        return max(self.context_lengths()) if self.contexts else len(self.tokens)

    def log_prob_temperature(self, turn: Turn) -> float:
        """The temperature at which `log_behaviour` of this turn is; above 0."""
        return max(turn.temperature or self.temperature, 0.0) or 1.0

    def check(self) -> str | None:
        """What is wrong with this trajectory, or None. Everything that comes off the wire is checked by it."""
        tokens, log = self.tokens, self.log_behaviour
        n = len(tokens)
        if tokens.dtype != _INT32 or log.dtype != _FLOAT32:
            return "tokens must be int32 and log_behaviour float32"
        if len(log) != n:
            return f"{len(log)} log-probs for {n} tokens"
        position = 0
        for turn in self.turns:
            start, length, reward = turn.start, turn.length, turn.reward
            if length < 0 or start < position or start + length > n:
                return f"turn at {start}+{length} is out of order or outside {n} tokens"
            if reward and not abs(reward) <= MOST_REWARD:
                return f"a turn's reward is not finite, or beyond {MOST_REWARD:g}"
            if (turn.notes or turn.token_notes) and (noted := _wrong_notes(turn)):
                return noted
            if turn.temperature and not (0 < turn.temperature < math.inf or turn.temperature == GREEDY):
                return f"a turn's temperature is {turn.temperature:g}"
            position = start + length
        if self.contexts and (wrong := self._wrong_context()) is not None:
            return wrong
        position = 0
        for span in self.versions:
            start, end = span.start, span.end
            if span.version < 0 or start < position or end < start or end > n:
                return f"version span {start}:{end} of version {span.version} is not valid"
            position = end
        if not self._versions_cover_turns():
            return "a policy token has no version"
        # The whole column is checked first: that is cheaper than gathering the policy tokens, and enough when it
        # passes. argmax and argmin find a NaN first and cost half of what max and min do on a short column.
        if n and not (log.item(log.argmax()) <= 1e-3 and log.item(log.argmin()) > -math.inf):
            log = log[self.policy_positions()]
            if not np.isfinite(log).all() or (log > 1e-3).any():
                return "a behaviour log-prob is not finite or above zero"
        if n and tokens.item(tokens.argmin()) < 0:
            return "a token is below zero"
        if self.ended != "error" and not abs(self.reward) <= MOST_REWARD:
            return f"the reward is not finite, or beyond {MOST_REWARD:g}"
        if not (math.isfinite(self.started_at) and math.isfinite(self.finished_at)):
            return "its times are not finite"
        return None

    def _wrong_context(self) -> str | None:
        """What is wrong with `contexts`, or None; turns are in order and disjoint."""
        turns = iter(self.turns)
        turn = next(turns, None)
        before = 0
        for start in self.contexts:
            if not before < start < len(self.tokens):
                return f"context at {start} is out of order or outside {len(self.tokens)} tokens"
            while turn is not None and turn.start + turn.length <= start:  # one without tokens ends a context
                turn = next(turns, None)
            if turn is not None and turn.start < start:
                return f"context at {start} is inside the turn at {turn.start}+{turn.length}"
            if turn is not None and turn.start == start:
                return f"the context at {start} begins with a sampled token, which nothing predicts"
            before = start
        return None

    def _versions_cover_turns(self) -> bool:
        """Whether every policy token lies in a span; turns and spans are in order and disjoint."""
        if self.turns and len(self.versions) == 1:
            only, final = self.versions[0], self.turns[-1]
            if only.start <= self.turns[0].start and final.start + final.length <= only.end:
                return True
        spans = iter(self.versions)
        covered = end = 0
        for turn in self.turns:
            position = turn.start
            last = position + turn.length
            while position < last:
                while end <= position:
                    span = next(spans, None)
                    if span is None:
                        return False
                    covered, end = span.start, span.end
                if covered > position:
                    return False
                position = end
        return True


def _wrong_notes(turn: Turn) -> str:
    """What is wrong with the notes of a turn; empty: nothing."""
    if len(dict(turn.notes)) < len(turn.notes) or len(dict(turn.token_notes)) < len(turn.token_notes):
        return "a turn has two notes of one name"
    if turn.token_notes and not turn.length:
        return "a turn without tokens has notes on them"
    if any(len(values) != turn.length for _, values in turn.token_notes):
        return f"a note on the tokens of a turn has not its {turn.length} numbers"
    if not all(math.isfinite(value) for _, value in turn.notes):
        return "a turn's note is not finite"
    if not all(math.isfinite(value) for _, values in turn.token_notes for value in values):
        return "a token's note is not finite"
    return ""


def turn_temperature(asked: float | None, trajectory: float) -> float:
    """What `Turn.temperature` records of a turn sampled at `asked` (None: as the trajectory; 0: greedily)."""
    if asked is None or asked == trajectory:
        return 0.0
    return asked or GREEDY


# ---------------------------------------------------------------- seeds: never dependent on timing


def group_seed(run_seed: int, group: int) -> int:
    """Seed of a group: depends on the run's seed and the group only. 63 bits."""
    digest = blake2b(f"{run_seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def attempt_seed(run_seed: int, position: int, attempt: int) -> int:
    """Seed of the `attempt`-th repetition of the group at `position` in the prompt order. 63 bits."""
    seed = group_seed(run_seed, position)
    return group_seed(seed, -attempt) if attempt else seed


def sample_seed(seed: int, sample: int) -> int:
    """Seed of one trajectory of a group. 63 bits."""
    return group_seed(seed, sample)


# ---------------------------------------------------------------- buckets of length

LENGTH_BUCKETS = (16, 64, 256, 1024, 4096, 16384)
"""upper ends (exclusive) of the buckets of trajectory length, in policy tokens; the last bucket is open. What is left
out of training is counted by them, so that a bias by length shows."""


def bucket_names() -> list[str]:
    """Names of the length buckets, in order, for metric keys."""
    ends = [f"below_{end}" for end in LENGTH_BUCKETS]
    return [*ends, f"from_{LENGTH_BUCKETS[-1]}"]


def bucket_of(policy_tokens: int) -> int:
    """Index of the bucket of this length."""
    return bisect_right(LENGTH_BUCKETS, policy_tokens)
