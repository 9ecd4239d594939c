"""What decisions of the sampler must be, counted anew from the raw trajectories each time, for simulated runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, log, sqrt
from random import Random
from typing import Any

from support_world import FAULTS, Invariants, some_world

from async_rl.buffer import effects as do
from async_rl.buffer.depth import Rules
from async_rl.buffer.sampler import Decision, SamplerRules
from async_rl.buffer.sampler_statistics import Outcome
from async_rl.config.sampler import SamplerSettings
from async_rl.instruments.world.world import World
from async_rl.task.order import PromptOrder
from async_rl.trajectory import Trajectory
from async_rl.wire import messages as msg

CLOSE = 1e-9
PROBLEMS, SOURCES = 12, 3


def some_rules(random: Random, group_size: int, **changes: Any) -> SamplerRules:
    """A sampler drawn at random, over a dozen problems of three sources."""
    chosen: dict[str, Any] = {
        "choose": random.choice(("order", "band", "thompson", "ucb", "curriculum")),
        "candidates": random.randint(2, 15),
        "low": 0.3,
        "high": 0.7,
        "refuse_outside": group_size > 1 and random.random() < 0.3,
        "half_life": random.choice((0.0, 2.0)),
        "value": random.choice(("variance", "vade")),
        "ucb_window": random.randint(1, 4),
        "ucb_temperature": 0.0,
        "target_groups": 10,
        "samples": random.choice(("fixed", "adaptive", "gvm")),
        "adaptive_above": 0.5,
        "min_samples": 1,
        "turns": random.choice(("fixed", "adaptive")),
        "start": random.choice(("none", "success", "failure", "field")),
        "start_share": random.choice((0.5, 1.0)),
        "start_success": random.choice((0.5, 1.0)),
        "start_attempts": random.choice((0, 2)),
        **changes,
    }
    return SamplerRules(
        chosen=SamplerSettings(**chosen),
        seed=random.randrange(100),
        group_size=group_size,
        largest=2 * group_size,
        problems=PROBLEMS,
        sources=tuple(p % SOURCES for p in range(PROBLEMS)) if chosen["choose"] == "ucb" else (),
    )


def sampled_world(seed: int, *, store: Any = None, kinds: Sequence[str] = FAULTS, **changes: Any) -> World:
    """A schedule of faults with a sampler drawn at random, watched."""
    drawn = rules_of(seed)
    rules = some_rules(Random(~seed), drawn.group_size, **changes)
    watch = SampledInvariants(policy=drawn.policy, rules=rules)
    return some_world(seed, kinds, store=store, sampler=rules, watch=watch)


def rules_of(seed: int) -> Rules:
    """What `some_world` draws for the state machine."""
    drawn: list[Rules] = []

    class Probe(World):
        def __init__(self, plan: Any, new_core: Any, **_: Any) -> None:
            drawn.append(new_core().rules)

    some_world(seed, kind=Probe)
    return drawn[0]


@dataclass(eq=False, kw_only=True)
class SampledInvariants(Invariants):
    """Counts anew, from the trajectories that were stored, what each decision must have been."""

    rules: SamplerRules
    decisions: dict[int, Decision] = field(default_factory=dict)
    """by group, in order of admission"""
    admitted: dict[int, do.AddGroup] = field(default_factory=dict)
    arrived: dict[int, dict[int, Trajectory]] = field(default_factory=lambda: defaultdict(dict))
    ended: list[int] = field(default_factory=list)
    """groups whose outcome is stored, in that order"""

    def written(self, effects: Sequence[do.Effect]) -> None:
        super().written(effects)
        for effect in effects:
            match effect:
                case do.AddGroup(split="train", group=group):
                    self.admitted[group] = effect
                case do.AddDecision(group=group, decision=decision):
                    self.check_decision(self.admitted[group], decision)
                    self.decisions[group] = decision
                case do.AddTrajectories(trajectories=many):
                    for t in many:
                        self.arrived[t.group][t.sample] = t
                case do.AddOutcome(outcome=outcome):
                    self.check_outcome(outcome)
                    self.ended.append(outcome.group)
                case do.FormBatch(groups=groups):
                    for group in groups:
                        assert sorted(self.arrived[group]) == list(range(self.decisions[group].samples))
                        if self.rules.chosen.refuse_outside:
                            tried = [t for t in self.arrived[group].values() if not t.failed]
                            assert 0.3 <= sum(t.reward > 0.5 for t in tried) / len(tried) <= 0.7

    def sent(self, message: msg.Message) -> None:
        super().sent(message)
        if isinstance(message, msg.Permits):
            for permit in message.permits:
                if permit.split == "train":
                    decision = self.decisions[permit.group]  # it was stored before
                    assert set(permit.samples) <= set(range(decision.samples))
                    assert (permit.problem, permit.max_turns) == (decision.problem, decision.max_turns)
                    assert (permit.start is None) == (decision.start is None)

    def check_problem(self, admitted: do.AddGroup) -> None:
        assert 0 <= admitted.problem < PROBLEMS

    # ------------------------------------------------------------------ counted anew

    def check_outcome(self, outcome: Outcome) -> None:
        assert outcome.number == len(self.ended)
        tried = {n: t for n, t in self.arrived[outcome.group].items() if not t.failed}
        good = [n for n, t in tried.items() if t.reward > 0.5]
        assert (outcome.attempts, outcome.successes) == (len(tried), len(good))
        assert outcome.tokens == sum(t.num_policy_tokens for t in tried.values())
        assert outcome.turns == max((len(tried[n].turns) for n in good), default=0)
        assert outcome.success == min(good, default=-1)
        assert outcome.failure == min(set(tried) - set(good), default=-1)

    def counted(self, problem: int, version: int) -> tuple[float, float]:
        """(attempts, successes) of a problem without a start, each faded by its age; the age is counted from the newest
        version that the problem had been tried with by then."""
        attempts = successes = 0.0
        reached = 0
        found: list[tuple[int, int, int]] = []
        for group in self.ended:
            tried = [t for t in self.arrived[group].values() if not t.failed]
            if self.decisions[group].problem != problem or not tried:
                continue
            reached = max(reached, *(t.version_max for t in tried))
            if self.decisions[group].start is None:
                found.append((reached, len(tried), sum(t.reward > 0.5 for t in tried)))
        half = self.rules.chosen.half_life
        for then, many, good in found:
            # fading stops at the newest version: a generator may be behind it
            weight = 0.5 ** (max(0, max(version, reached) - then) / half) if half else 1.0
            attempts, successes = attempts + weight * many, successes + weight * good
        return attempts, successes

    def success(self, problem: int, version: int) -> float:
        attempts, successes = self.counted(problem, version)
        return (1 + successes) / (2 + attempts)

    def check_decision(self, admitted: do.AddGroup, decision: Decision) -> None:
        if admitted.attempt:
            first = next(g for g, a in self.admitted.items() if a.position == admitted.position)
            assert decision == self.decisions[first], "a further attempt asks what the first did"
            return
        rules, chosen = self.rules, self.rules.chosen
        position, version = admitted.position, admitted.admitted_version
        assert decision.seen == len(self.ended)
        assert decision.problem == admitted.problem
        assert abs(decision.estimate - self.success(decision.problem, version)) < CLOSE
        order = PromptOrder(PROBLEMS, rules.seed)
        offered = [order(position * chosen.candidates + n) for n in range(chosen.candidates)]
        match chosen.choose:
            case "order":
                assert decision.problem == order(position)
            case "band":
                self.check_nearest(decision, offered, lambda p: max(0.3 - p, p - 0.7, 0.0), version)
            case "curriculum":
                target = 0.8 - 0.4 * min(1.0, position / 10)
                self.check_nearest(decision, offered, lambda p: abs(p - target), version)
            case "thompson":
                random = Random(rules.seed * 0x9E3779B97F4A7C15 + position & (1 << 64) - 1)
                worth = {}
                for problem in dict.fromkeys(offered):
                    attempts, successes = self.counted(problem, version)
                    p = random.betavariate(1 + successes, 1 + (attempts - successes))
                    worth[problem] = p * (1 - p) if chosen.value == "variance" else p * (1 - p) * (1 - p)
                assert worth[decision.problem] > max(worth.values()) - 1e-6
            case "ucb":
                self.check_bound(decision)
        self.check_size(decision)
        self.check_start(decision, version)

    def check_nearest(self, decision: Decision, offered: Sequence[int], distance: Any, version: int) -> None:
        found = {problem: distance(self.success(problem, version)) for problem in offered}
        assert found[decision.problem] < min(found.values()) + CLOSE

    def firsts(self) -> list[Decision]:
        return [d for group, d in self.decisions.items() if self.admitted[group].attempt == 0]

    def check_bound(self, decision: Decision) -> None:
        bounds = []
        for source in range(SOURCES):
            asked = sum(d.problem % SOURCES == source for d in self.firsts())
            signals = []
            for group in self.ended:
                tried = [t for t in self.arrived[group].values() if not t.failed]
                plain = self.decisions[group].start is None and bool(tried)
                if plain and self.decisions[group].problem % SOURCES == source:
                    mean = sum(t.reward > 0.5 for t in tried) / len(tried)
                    spread = sqrt(mean * (1 - mean))
                    # rewards of 0 and 1, centred and divided by their deviation: the mean of their absolute values
                    signals.append(sum(abs((t.reward > 0.5) - mean) for t in tried) / len(tried) / (spread or 1))
            newest = signals[-self.rules.chosen.ucb_window :]
            mean = sum(newest) / len(newest) if newest else 1.0
            bounds.append(mean + sqrt(2 * log(len(self.firsts()) + 1) / (asked + 1)) if asked else inf)
        assert bounds[decision.problem % SOURCES] >= max(bounds) - CLOSE

    def check_size(self, decision: Decision) -> None:
        size, p = self.rules.group_size, decision.estimate
        match self.rules.chosen.samples:
            case "fixed":
                assert decision.samples == size
            case "adaptive":
                assert decision.samples == (size if p <= 0.5 else max(1, ceil(size * (1 - p) / 0.5 - CLOSE)))
            case "gvm":
                weight, mean = 1 / sqrt(p + 1e-3 / p), 0.0
                for n, before in enumerate(self.firsts(), start=1):
                    mean += max(1 / n, 0.01) * (1 / sqrt(before.estimate + 1e-3 / before.estimate) - mean)
                assert abs(decision.samples - min(2 * size, max(1, size * weight / (mean or weight)))) < 0.5 + CLOSE
        longest = 0
        for group in self.ended:
            if self.decisions[group].problem == decision.problem:
                good = [t for t in self.arrived[group].values() if not t.failed and t.reward > 0.5]
                longest = max(longest, *(len(t.turns) for t in good), 0)
        adaptive = self.rules.chosen.turns == "adaptive" and longest
        assert decision.max_turns == (ceil(1.5 * longest) if adaptive else 0)

    def check_start(self, decision: Decision, version: int) -> None:
        chosen = self.rules.chosen
        if decision.start is None:
            return
        attempts, successes = self.counted(decision.problem, version)
        assert attempts > chosen.start_attempts - CLOSE
        assert successes < chosen.start_success * attempts + CLOSE
        assert 0.2 <= decision.start.share <= 0.8
        if decision.start.source == "field":
            return
        t = self.arrived[decision.start.group][decision.start.sample]
        assert t.problem == decision.problem
        assert not t.failed
        assert (t.reward > 0.5) == (decision.start.source == "success")
        assert self.decisions[t.group].start is None
