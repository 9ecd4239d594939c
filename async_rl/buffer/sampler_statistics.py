"""What is known of the problems: a fold over decided groups and the outcomes of groups that ended (`Statistics`).

The order of the fold is that of the store, so that a buffer that comes back knows the same numbers to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from msgspec import Struct

from async_rl.buffer.sampler import Decision, Evidence, SamplerRules, gvm_weight

MEMORY = 0.01
"""weight of the newest decision in a running mean; a plain mean while fewer than 1 / this are in it"""


class Outcome(Struct, frozen=True, kw_only=True, gc=False):
    """What came of a group whose samples have all arrived. A row of the store."""

    number: int
    """0, 1, 2, ... in the order in which they ended"""
    group: int
    problem: int
    attempts: int
    """samples that did not fail"""
    successes: int
    tokens: int
    """policy tokens of the attempts"""
    version: int
    """of the newest token; -1: there is none"""
    started: bool
    """its answers began with a start, so that they say nothing of the problem's own success"""
    turns: int = 0
    """of the longest success; 0: none succeeded"""
    success: int = -1
    """the lowest sample that succeeded; -1: none"""
    failure: int = -1
    """the lowest attempt that did not; -1: none"""


@dataclass(slots=True, kw_only=True)
class SourceEvidence:
    """What is known of one source of the data."""

    asked: int = 0
    """groups decided"""
    advantages: deque[float] = field(default_factory=deque)
    """mean |advantage| of its newest groups"""


@dataclass(slots=True)
class Statistics:
    """All that decisions depend on, beside seed, position and version."""

    rules: SamplerRules
    problems: dict[int, Evidence] = field(default_factory=dict)
    """those that were tried"""
    sources: list[SourceEvidence] = field(init=False)
    outcomes: int = 0
    """folded in"""
    decided: int = 0
    """groups, those of further attempts left out"""
    mean_weight: float = 0.0
    """running mean of GVM's weight over the decisions; 0: before the first"""

    def __post_init__(self) -> None:
        window = self.rules.chosen.ucb_window
        self.sources = [
            SourceEvidence(advantages=deque(maxlen=window)) for _ in range(max(self.rules.sources, default=-1) + 1)
        ]

    # -------------------------------------------------------------------- the fold

    def decide(self, decision: Decision) -> None:
        """A group was admitted with this decision, at a new position."""
        self.decided += 1
        weight = gvm_weight(decision.estimate)
        share = max(1 / self.decided, MEMORY)
        self.mean_weight += share * (weight - self.mean_weight)
        if self.rules.sources:
            self.sources[self.rules.sources[decision.problem]].asked += 1

    def add(self, outcome: Outcome) -> None:
        """A group has ended."""
        assert outcome.number == self.outcomes
        self.outcomes += 1
        if not outcome.attempts:
            return
        found = self.problems.setdefault(outcome.problem, Evidence())
        version = max(found.version, outcome.version)
        fade = self._fade(version - found.version)
        found.seen += outcome.attempts
        found.tokens += (outcome.tokens - outcome.attempts * found.tokens) / found.seen
        found.attempts *= fade
        found.successes *= fade
        found.version = version
        found.turns = max(found.turns, outcome.turns)
        if outcome.started:
            return
        found.attempts += outcome.attempts
        found.successes += outcome.successes
        if outcome.success >= 0:
            found.success = (outcome.group, outcome.success)
        if outcome.failure >= 0:
            found.failure = (outcome.group, outcome.failure)
        if self.rules.sources:
            p = outcome.successes / outcome.attempts
            self.sources[self.rules.sources[outcome.problem]].advantages.append(2 * sqrt(p * (1 - p)))

    def replay(self, decisions: Iterable[Decision], outcomes: Sequence[Outcome]) -> None:
        """Fold what a store holds, each in its order."""
        for decision in decisions:
            self.decide(decision)
        for outcome in outcomes:
            self.add(outcome)

    # ---------------------------------------------------------------- what it says

    def evidence(self, problem: int) -> Evidence | None:
        """Of a problem that was tried."""
        return self.problems.get(problem)

    def counted(self, problem: int, version: int) -> tuple[float, float]:
        """(attempts, successes) of a problem, as far as they count for a generator that holds `version`."""
        found = self.problems.get(problem)
        if found is None:
            return 0.0, 0.0
        fade = self._fade(version - found.version)
        return fade * found.attempts, fade * found.successes

    def beta(self, problem: int, version: int) -> tuple[float, float]:
        """What is believed of its success: a Beta distribution that was uniform before the first attempt."""
        attempts, successes = self.counted(problem, version)
        return 1 + successes, 1 + (attempts - successes)

    def estimate(self, problem: int, version: int) -> float:
        """Mean of that distribution."""
        a, b = self.beta(problem, version)
        return a / (a + b)

    def asked(self, source: int) -> int:
        """Groups decided of a source."""
        return self.sources[source].asked

    def advantage(self, source: int) -> float:
        """Mean |advantage| of a source's newest groups, rewards centred and divided by their deviation: of a share p of
        successes 2 sqrt(p (1 - p)). 1, the largest, before the first."""
        newest = self.sources[source].advantages
        return sum(newest) / len(newest) if newest else 1.0

    def _fade(self, versions: int) -> float:
        """What counts of something so many versions old."""
        half_life = self.rules.chosen.half_life
        return 0.5 ** (max(0, versions) / half_life) if half_life else 1.0
