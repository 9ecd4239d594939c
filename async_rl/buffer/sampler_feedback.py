"""From finished groups to the next decision, inside the state machine (`Feedback`).

Who waits for whom: nobody. A decision is stored with its group before the permit is given, and never taken again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from async_rl.buffer.ledger import Group, Ledger
from async_rl.buffer.sampler import Decision, Sampler, SamplerRules
from async_rl.buffer.sampler_statistics import Outcome, Statistics
from async_rl.config.sampler import SamplerSettings
from async_rl.wire.messages import SamplerCounters, Start

OUT_OF_BAND = "out_of_band"
"""reason of a group that was refused for its own success"""
SPARE = 1024
"""decisions of ended positions that are kept until the next clearing"""


class StoredDecision(Struct, frozen=True, kw_only=True, gc=False):
    """A decision as a buffer that comes back finds it."""

    group: int
    position: int
    attempt: int
    decision: Decision


@dataclass(slots=True, kw_only=True)
class Feedback:
    """Decides for the admission, and learns from what ended."""

    rules: SamplerRules
    ledger: Ledger
    sampler: Sampler = field(init=False)
    known: Statistics = field(init=False)
    decisions: dict[int, Decision] = field(default_factory=dict)
    """by position, of those under way, to be asked again, and some that ended"""
    room: int = SPARE
    counters: SamplerCounters | None = None
    """of the newest batch; None: none was formed by this buffer"""

    def __post_init__(self) -> None:
        self.sampler, self.known = Sampler(self.rules), Statistics(self.rules)

    def decide(self, position: int, attempt: int, version: int, refill: Sequence[tuple[int, int]]) -> Decision:
        """What the group at this position asks. A further attempt asks what the first did. `refill`: positions and
        attempts that wait to be asked again."""
        if attempt:
            return self.decisions[position]
        decision = self.sampler.decide(position, version, self.known)
        self.known.decide(decision)
        if len(self.decisions) >= self.room:
            needed = {group.position for group in self.ledger.groups.values()} | {place for place, _ in refill}
            self.decisions = {place: self.decisions[place] for place in needed if place in self.decisions}
            self.room = 2 * len(self.decisions) + SPARE
        self.decisions[position] = decision
        return decision

    def close(self, group: Group) -> Outcome:
        """All samples of a group have arrived: what came of it."""
        outcome = outcome_of(group, self.known.outcomes, self.rules.chosen.success)
        self.known.add(outcome)
        return outcome

    def refusal(self, group: Group) -> str:
        """Why a complete group is not trained for its own success; empty: it may be."""
        chosen, usable = self.rules.chosen, group.usable
        if not chosen.refuse_outside or not usable:
            return ""
        successes = sum(sample.reward > chosen.success for sample in usable)
        if chosen.low <= successes / len(usable) <= chosen.high:
            return ""
        return f"{OUT_OF_BAND}: {successes} of {len(usable)} succeeded"

    def form(self, groups: Sequence[Group]) -> None:
        """These groups are a batch: count what was chosen."""
        chosen, n = self.rules.chosen, len(groups)
        decided = [group.decision for group in groups if group.decision is not None]
        if len(decided) < n:
            self.counters = None
            return
        limits = [decision.max_turns for decision in decided if decision.max_turns]
        self.counters = SamplerCounters(
            estimate=sum(decision.estimate for decision in decided) / n,
            in_band=sum(chosen.low <= decision.estimate <= chosen.high for decision in decided) / n,
            samples=sum(group.size for group in groups) / n,
            started=sum(decision.start is not None for decision in decided) / n,
            max_turns=sum(limits) / len(limits) if limits else 0.0,
            problems_tried=len(self.known.problems),
            by_source=self._by_source(decided),
        )

    def restore(
        self, decided: Iterable[StoredDecision], outcomes: Sequence[Outcome], waiting: Sequence[tuple[int, int]]
    ) -> None:
        """Go on where the buffer before stood. `decided`: all of them, in order of admission; `waiting`: positions and
        attempts to be asked again."""
        needed = {group.position for group in self.ledger.groups.values()} | {place for place, _ in waiting}
        for one in decided:
            if one.attempt == 0:
                self.known.decide(one.decision)
            if one.position in needed:
                self.decisions[one.position] = one.decision
        for outcome in outcomes:
            self.known.add(outcome)

    def _by_source(self, decided: Sequence[Decision]) -> Mapping[str, float]:
        """Source -> share of a batch's groups, of those that have any; empty where sources are not told apart."""
        if not self.rules.sources:
            return {}
        counts = Counter(self.rules.sources[decision.problem] for decision in decided)
        return {str(source): count / len(decided) for source, count in sorted(counts.items())}


def outcome_of(group: Group, number: int, success: float) -> Outcome:
    """What came of a complete group. `success`: rewards above it are successes."""
    attempts = successes = tokens = turns = 0
    version = first_success = first_failure = -1
    for place in group.permit.samples:  # in one pass: it is done for every group
        sample = group.samples[place]
        if sample.failed:
            continue
        attempts += 1
        tokens += sample.policy_length
        version = max(version, sample.version_max)
        if sample.reward > success:
            successes += 1
            turns = max(turns, sample.num_turns)
            first_success = place if first_success < 0 else first_success
        elif first_failure < 0:
            first_failure = place
    return Outcome(
        number=number,
        group=group.group,
        problem=group.problem,
        attempts=attempts,
        successes=successes,
        tokens=tokens,
        version=version,
        started=group.permit.start is not None,
        turns=turns,
        success=first_success,
        failure=first_failure,
    )


def start_in(decision: Decision, settings: SamplerSettings | None) -> Start | None:
    """What the permit of a group with this decision says of its start; tokens of a stored answer are filled in when it
    is sent. `settings`: None where there is no sampler, and starts are earlier pieces."""
    chosen = decision.start
    if chosen is None:
        return None
    if chosen.source != "field":
        return Start(source=chosen.source, share=chosen.share, group=chosen.group)
    assert settings is not None
    in_prompt = settings.start_place == "prompt"
    return Start(
        source="field",
        share=chosen.share,
        field=settings.start_field,
        in_prompt=in_prompt,
        instruction=settings.start_instruction if in_prompt else "",
    )
