"""Which problem is asked next, how many samples it gets and from where they start: `Sampler`, a pure function of (seed,
position, what was known when the group was admitted).

What was known is a fold (sampler_statistics.py) over two sequences that the store keeps in their order: the groups that
were decided and the outcomes of those that ended. A decision names how many outcomes it had seen, so it can be computed
again from the store alone: by a buffer that comes back, and by `async-rl audit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from math import ceil, exp, inf, log, sqrt
from random import Random
from typing import Literal, Protocol

from msgspec import Struct

from async_rl.config.sampler import SamplerSettings
from async_rl.task.order import PromptOrder

GVM_ALPHA, GVM_BETA = 1e-3, 2.0
"""of GVM-RAFT (2505.02391)"""


class StartChoice(Struct, frozen=True, kw_only=True, gc=False):
    """From where the answers of a group start."""

    source: Literal["field", "success", "failure", "window"]
    """window: an earlier piece of the episode (buffer/windows.py)"""
    share: float
    """of the text, or of the stored answer, that is given; a failure with a noted error is given up to that"""
    group: int = -1
    """of the stored answer; -1: the text of a field"""
    sample: int = -1


class Decision(Struct, frozen=True, kw_only=True, gc=False):
    """What a group asks."""

    problem: int
    samples: int
    seen: int
    """outcomes that were known"""
    estimate: float
    """success of the problem as it was estimated then"""
    max_turns: int = 0
    """of an episode; 0: as many as generator.max_turns"""
    start: StartChoice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRules:
    """Everything that decisions depend on, beside what is known."""

    chosen: SamplerSettings
    seed: int
    group_size: int
    largest: int
    """most samples of a group"""
    problems: int
    """of the training split"""
    sources: Sequence[int] = ()
    """number of the source of each problem; empty: none are told apart"""


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What is known of one problem. Counts are as of `version`; older ones have faded until then."""

    attempts: float = 0.0
    successes: float = 0.0
    """of attempts without a start"""
    tokens: float = 0.0
    """mean policy tokens of an attempt"""
    seen: int = 0
    """attempts, with a start or without, that nothing faded"""
    version: int = 0
    """of the last attempt"""
    turns: int = 0
    """of the longest success"""
    success: tuple[int, int] | None = None
    """(group, sample) of the newest success without a start"""
    failure: tuple[int, int] | None = None
    """(group, sample) of the newest attempt without a start that did not succeed"""


class Known(Protocol):
    """All that decisions depend on, beside seed, position and version; implemented by
    `sampler_statistics.Statistics`."""

    outcomes: int
    """groups that have ended"""
    decided: int
    """groups, those of further attempts left out"""
    mean_weight: float
    """running mean of GVM's weight over the decisions; 0: before the first"""

    def evidence(self, problem: int) -> Evidence | None:
        """Of a problem that was tried."""
        ...

    def counted(self, problem: int, version: int) -> tuple[float, float]:
        """(attempts, successes) of a problem, as far as they count for a generator that holds `version`."""
        ...

    def beta(self, problem: int, version: int) -> tuple[float, float]:
        """What is believed of its success: parameters of a Beta distribution."""
        ...

    def estimate(self, problem: int, version: int) -> float:
        """Mean of that distribution."""
        ...

    def asked(self, source: int) -> int:
        """Groups decided of a source."""
        ...

    def advantage(self, source: int) -> float:
        """Mean |advantage| of a source's newest groups."""
        ...


def uniform(seed: int, position: int, what: str) -> float:
    """A number in [0, 1) that depends on these alone, in every version of every library."""
    digest = blake2b(f"{seed}:{position}:{what}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(slots=True)
class Sampler:
    """Decides. It keeps nothing but orders that it computed."""

    rules: SamplerRules
    order: PromptOrder = field(init=False)
    of_source: list[tuple[list[int], PromptOrder]] = field(init=False)
    """the problems of each source, and the order in which they are asked"""

    def __post_init__(self) -> None:
        rules = self.rules
        self.order = PromptOrder(rules.problems, rules.seed)
        members: list[list[int]] = [[] for _ in range(max(rules.sources, default=-1) + 1)]
        for problem, source in enumerate(rules.sources):
            members[source].append(problem)
        self.of_source = [(some, PromptOrder(len(some), rules.seed)) for some in members]

    def decide(self, position: int, version: int, known: Known) -> Decision:
        """The group at `position`, begun by a generator that holds `version`."""
        problem = self._problem(position, version, known)
        evidence = known.evidence(problem)
        estimate = known.estimate(problem, version)
        return Decision(
            problem=problem,
            samples=self._samples(estimate, known),
            seen=known.outcomes,
            estimate=estimate,
            max_turns=self._turns(evidence),
            start=self._start(position, problem, version, known),
        )

    # ------------------------------------------------------------- which problem

    def _problem(self, position: int, version: int, known: Known) -> int:
        chosen = self.rules.chosen
        match chosen.choose:
            case "order":
                return self.order(position)
            case "ucb":
                return self._of_source(position, known)
            case "band":
                return self._nearest(position, lambda p: _beside(known.estimate(p, version), chosen.low, chosen.high))
            case "curriculum":
                target = target_at(chosen, position)
                return self._nearest(position, lambda p: abs(known.estimate(p, version) - target))
            case "thompson":
                random = Random((self.rules.seed * 0x9E3779B97F4A7C15 + position) & 0xFFFFFFFFFFFFFFFF)
                return self._nearest(position, lambda p: -self._worth(*known.beta(p, version), random))

    def candidates(self, position: int) -> list[int]:
        """The problems offered at a position: the next ones in the prompt order, each once."""
        many = self.rules.chosen.candidates
        return list(dict.fromkeys(self.order.stretch(position * many, many)))

    def _nearest(self, position: int, distance: Callable[[int], float]) -> int:
        """The candidate with the least distance; the first of several."""
        return min(self.candidates(position), key=distance)

    def _worth(self, a: float, b: float, random: Random) -> float:
        """Of a problem whose success is believed to be Beta(a, b): at a success drawn from that."""
        p = random.betavariate(a, b)
        return p * (1 - p) if self.rules.chosen.value == "variance" else p * (1 - p) ** 2

    def _of_source(self, position: int, known: Known) -> int:
        """The next problem of a source that is drawn by its upper confidence bound."""
        bounds = [self.bound(source, known) for source in range(len(self.of_source))]
        temperature = self.rules.chosen.ucb_temperature
        best = max(bounds)
        source = bounds.index(best)
        if temperature and best < inf:
            weights = list(accumulate(exp((bound - best) / temperature) for bound in bounds))
            drawn = uniform(self.rules.seed, position, "source") * weights[-1]
            source = next(number for number, weight in enumerate(weights) if drawn < weight)
        members, order = self.of_source[source]
        return members[order(known.asked(source))]

    def bound(self, source: int, known: Known) -> float:
        """Upper confidence bound of a source's mean |advantage| (DUMP, 2504.09710). One without a finished group comes
        first, as often as another one may have been asked meanwhile."""
        asked = known.asked(source)
        if not asked:
            return inf
        return known.advantage(source) + sqrt(2 * log(known.decided + 1) / (asked + 1))

    # ----------------------------------------------------- how many, how long, from where

    def _samples(self, estimate: float, known: Known) -> int:
        chosen, size = self.rules.chosen, self.rules.group_size
        match chosen.samples:
            case "fixed":
                return size
            case "adaptive":
                over = max(0.0, estimate - chosen.adaptive_above) / (1 - chosen.adaptive_above)
                return max(chosen.min_samples, ceil(size * (1 - over) - 1e-9))
            case "gvm":
                weight = gvm_weight(estimate)
                wanted = size * weight / (known.mean_weight or weight)
                return min(self.rules.largest, max(chosen.min_samples, round(wanted)))

    def _turns(self, evidence: Evidence | None) -> int:
        if self.rules.chosen.turns == "fixed" or evidence is None or not evidence.turns:
            return 0
        return ceil(evidence.turns * self.rules.chosen.turns_slack - 1e-9)

    def _start(self, position: int, problem: int, version: int, known: Known) -> StartChoice | None:
        chosen, seed = self.rules.chosen, self.rules.seed
        if chosen.start == "none":
            return None
        attempts, successes = known.counted(problem, version)
        if attempts < chosen.start_attempts or successes > chosen.start_success * attempts:
            return None
        if uniform(seed, position, "start") >= chosen.start_share:
            return None
        share = chosen.start_min + (chosen.start_max - chosen.start_min) * uniform(seed, position, "share")
        if chosen.start == "field":
            return StartChoice(source="field", share=share)
        evidence = known.evidence(problem)
        stored = None if evidence is None else evidence.success if chosen.start == "success" else evidence.failure
        if stored is None:
            return None
        return StartChoice(source=chosen.start, share=share, group=stored[0], sample=stored[1])


def gvm_weight(p: float) -> float:
    """Samples that a problem of acceptance rate p gets, up to a factor: 1 / sqrt(p + alpha / p^(beta - 1)), with equal
    gradient norms, which the buffer does not know (GVM-RAFT, 2505.02391)."""
    return 1 / sqrt(p + GVM_ALPHA / p ** (GVM_BETA - 1))


def target_at(chosen: SamplerSettings, position: int) -> float:
    """Success that the curriculum aims at."""
    way = min(1.0, position / chosen.target_groups)
    return chosen.target_begin + (chosen.target_end - chosen.target_begin) * way


def _beside(p: float, low: float, high: float) -> float:
    """How far p lies outside the band."""
    return max(low - p, p - high, 0.0)
