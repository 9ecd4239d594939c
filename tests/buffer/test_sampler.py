"""Decisions of the sampler against the published rules, counted by hand; ragged groups in the state machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from math import exp, log, sqrt
from statistics import fmean, pvariance
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_buffer import TRAINER, answer, make_core, policies

from async_rl.buffer import effects as do
from async_rl.buffer.build import make_core as build_core
from async_rl.buffer.core import Core
from async_rl.buffer.sampler import Sampler, SamplerRules, gvm_weight, target_at, uniform
from async_rl.buffer.sampler_statistics import Outcome, Statistics
from async_rl.buffer.staleness import PacePolicy, Policy
from async_rl.config import Settings
from async_rl.config.sampler import SamplerSettings
from async_rl.task.order import PromptOrder
from async_rl.trajectory.given import GIVEN
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1)
MANY = 10**6
"""attempts after which an estimate is the share of successes, as far as anything here can tell"""


def rules(problems: int = 8, *, sources: tuple[int, ...] = (), size: int = 8, **chosen: Any) -> SamplerRules:
    return SamplerRules(
        chosen=SamplerSettings(**chosen), seed=5, group_size=size, largest=2 * size, problems=problems, sources=sources
    )


def known(given: SamplerRules, shares: dict[int, float], *, attempts: int = MANY, version: int = 0) -> Statistics:
    """Statistics in which each problem succeeded in this share of many attempts."""
    found = Statistics(given)
    for number, (problem, share) in enumerate(shares.items()):
        found.add(outcome(number, problem, attempts, round(share * attempts), version=version))
    return found


def outcome(number: int, problem: int, attempts: int, successes: int, **more: Any) -> Outcome:
    values = {"group": number, "tokens": 10 * attempts, "version": 0, "started": False, **more}
    return Outcome(number=number, problem=problem, attempts=attempts, successes=successes, **values)


def test_without_a_setting_nothing_is_decided_and_the_prompt_order_is_as_ever() -> None:
    core = build_core(Settings(), train_problems=50, vocabulary=0)
    assert core.rules.sampler is None
    assert core.admission.feedback is None
    plain = {"choose": "order", "samples": "fixed", "turns": "fixed", "start": "none", "refuse_outside": False}
    assert plain.items() <= asdict(SamplerSettings()).items()


def test_counts_and_lengths_may_follow_the_success_while_the_order_stays() -> None:
    sampler = Sampler(rules(problems=30, samples="adaptive", turns="adaptive"))
    found = [sampler.decide(position, 0, Statistics(sampler.rules)) for position in range(60)]
    order = PromptOrder(30, 5)
    assert [decision.problem for decision in found] == [order(position) for position in range(60)]
    assert {(decision.samples, decision.max_turns) for decision in found} == {(8, 0)}


def test_a_band_takes_what_is_neither_too_hard_nor_too_easy() -> None:
    """Online difficulty filtering: of the problems offered, one whose success lies within the bounds."""
    given = rules(choose="band", candidates=8, low=0.2, high=0.8)
    shares = {0: 0.0, 1: 1.0, 2: 0.05, 3: 0.95, 4: 0.5, 5: 0.0, 6: 1.0, 7: 0.9}
    assert {Sampler(given).decide(p, 0, known(given, shares)).problem for p in range(50)} == {4}
    del shares[4]  # never tried: it may be in the band
    assert {Sampler(given).decide(p, 0, known(given, shares)).problem for p in range(50)} == {4}
    shares[4] = 1.0  # none is: the nearest
    assert {Sampler(given).decide(p, 0, known(given, shares)).problem for p in range(50)} == {7}


def test_vade_asks_what_succeeds_one_time_in_three_and_variance_one_in_two() -> None:
    """p (1 - p)^2 is largest at 1/3 (4/27), p (1 - p) at 1/2; of 0.1, 0.5, 0.7, 0.9: .081 .125 .063 .009."""
    shares = dict(enumerate((0.1, 1 / 3, 0.5, 0.7, 0.9, 0.0, 1.0, 0.99)))
    for value, best in (("vade", 1), ("variance", 2)):
        given = rules(choose="thompson", candidates=8, value=value)
        assert {Sampler(given).decide(p, 0, known(given, shares)).problem for p in range(30)} == {best}


def test_thompson_draws_the_success_from_what_is_believed() -> None:
    """With two problems of equal belief both are asked; the draws have the Beta distribution's mean and variance."""
    given = rules(problems=2, choose="thompson", candidates=2)
    asked = Counter(Sampler(given).decide(p, 0, Statistics(given)).problem for p in range(400))
    assert min(asked.values()) > 150
    few = known(given, {0: 0.25}, attempts=8)
    assert few.beta(0, 0) == (3.0, 7.0)
    from random import Random

    draws = [Random(given.seed * 0x9E3779B97F4A7C15 + p).betavariate(3.0, 7.0) for p in range(4000)]
    assert fmean(draws) == pytest.approx(0.3, abs=0.01)
    assert pvariance(draws) == pytest.approx(0.3 * 0.7 / 11, rel=0.1)


def test_the_curriculum_aims_at_a_success_that_moves() -> None:
    chosen = SamplerSettings(choose="curriculum", target_begin=0.9, target_end=0.1, target_groups=100)
    assert [target_at(chosen, p) for p in (0, 50, 100, 500)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    given = rules(choose="curriculum", target_begin=0.9, target_end=0.1, target_groups=100)
    shares = dict(enumerate((0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)))
    found = [shares[Sampler(given).decide(p, 0, known(given, shares)).problem] for p in range(0, 120, 10)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (0.9, 0.1)


def test_a_source_is_drawn_by_its_upper_confidence_bound() -> None:
    """DUMP: mean |A| + sqrt(2 log(n + 1) / (n_source + 1)), through a softmax."""
    sources = tuple(p % 2 for p in range(8))
    given = rules(choose="ucb", sources=sources, ucb_temperature=0.5, ucb_window=2)
    sampler, found = Sampler(given), Statistics(given)
    for number, (problem, good) in enumerate(((0, 0), (1, 4), (0, 8), (1, 2), (0, 4), (1, 8))):
        found.decide(sampler.decide(number, 0, found))
        found.add(outcome(number, problem, 8, good))
    asked = [found.asked(source) for source in (0, 1)]
    assert sum(asked) == 6
    # the window holds two groups: source 0 had 8 and 4 of 8, source 1 had 2 and 8 of 8
    advantage = [(0.0 + 1.0) / 2, (2 * sqrt(0.25 * 0.75) + 0.0) / 2]
    bounds = [a + sqrt(2 * log(7) / (n + 1)) for a, n in zip(advantage, asked, strict=True)]
    assert [sampler.bound(source, found) for source in (0, 1)] == pytest.approx(bounds)
    share = exp(bounds[0] / 0.5) / sum(exp(bound / 0.5) for bound in bounds)
    drawn = [sources[sampler.decide(p, 0, found).problem] for p in range(3000)]
    assert drawn.count(0) / 3000 == pytest.approx(share, abs=0.03)


def test_a_source_asks_its_problems_each_once_an_epoch() -> None:
    sources = (0, 1, 0, 1, 0, 1, 1, 1)
    given = rules(choose="ucb", sources=sources)
    sampler, found = Sampler(given), Statistics(given)
    of_source: dict[int, list[int]] = {0: [], 1: []}
    for position in range(40):
        decision = sampler.decide(position, 0, found)
        found.decide(decision)
        of_source[sources[decision.problem]].append(decision.problem)
    for source, members in ((0, [0, 2, 4]), (1, [1, 3, 5, 6, 7])):
        asked, n = of_source[source], len(members)
        for begin in range(0, len(asked) - n, n):
            assert sorted(asked[begin : begin + n]) == members


def test_easy_problems_get_fewer_samples() -> None:
    """DART: fewer rollouts of tasks that succeed often, here from 0.6 on, in proportion to what is left to fail."""
    given = rules(samples="adaptive", adaptive_above=0.6, min_samples=2)
    for share, samples in ((0.0, 8), (0.5, 8), (0.6, 8), (0.71, 6), (0.81, 4), (0.96, 2), (1.0, 2)):
        state = known(given, dict.fromkeys(range(8), share), attempts=10**9)
        assert Sampler(given).decide(0, 0, state).samples == samples


def test_gvm_divides_a_budget_as_the_variance_asks() -> None:
    """n ~ 1 / sqrt(p + alpha / p), alpha 0.001: hopeless and easy problems get few; the mean stays the group's size."""
    assert gvm_weight(0.5) == pytest.approx(1 / sqrt(0.5 + 0.001 / 0.5))
    assert gvm_weight(0.001) == pytest.approx(1 / sqrt(0.001 + 1.0))
    assert max((gvm_weight(p / 1000), p / 1000) for p in range(1, 1000))[1] == pytest.approx(sqrt(0.001), abs=1e-3)
    given = rules(samples="gvm", min_samples=1)
    shares = dict(enumerate((0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95)))
    sampler, state = Sampler(given), known(given, shares)
    sizes: dict[int, int] = {}
    for position in range(400):
        decision = sampler.decide(position, 0, state)
        state.decide(decision)
        sizes[decision.problem] = decision.samples
    weights = {problem: gvm_weight(share) for problem, share in shares.items()}
    mean = fmean(weights.values())
    for problem, weight in weights.items():
        assert sizes[problem] == pytest.approx(min(16, 8 * weight / mean), abs=1.0)


def test_limits_on_turns_follow_the_longest_success() -> None:
    given = rules(turns="adaptive", turns_slack=1.5)
    state = Statistics(given)
    problem = PromptOrder(8, 5)(0)
    state.add(outcome(0, problem, 8, 0))
    assert Sampler(given).decide(0, 0, state).max_turns == 0  # no success yet: nobody knows
    state.add(outcome(1, problem, 8, 1, turns=3))
    assert Sampler(given).decide(0, 0, state).max_turns == 5
    state.add(outcome(2, problem, 8, 1, turns=2, started=True))
    assert Sampler(given).decide(0, 0, state).max_turns == 5


def test_what_is_old_counts_less() -> None:
    given = rules(half_life=4.0)
    state = known(given, {0: 1.0}, attempts=8, version=2)
    assert state.counted(0, 2) == (8.0, 8.0)
    assert state.counted(0, 6) == (4.0, 4.0)
    assert state.counted(0, 1) == (8.0, 8.0)  # a generator that is behind
    state.add(outcome(1, 0, 8, 0, version=10))
    assert state.counted(0, 10) == (8 + 8 / 4, 8 / 4)
    assert state.estimate(0, 10) == pytest.approx(3 / 12)


def test_hard_problems_get_starts_and_their_starts_say_nothing_of_them() -> None:
    """POPE: guided and plain samples of the problems that nothing solved."""
    given = rules(start="field", start_field="oracle", start_success=0.0, start_attempts=8, start_share=0.5)
    hard, easy = PromptOrder(8, 5)(0), PromptOrder(8, 5)(1)
    sampler, state = Sampler(given), Statistics(given)
    assert sampler.decide(0, 0, state).start is None  # not tried often enough
    state.add(outcome(0, hard, 8, 0))
    state.add(outcome(1, easy, 8, 1))
    shares = [(p, sampler.decide(p, 0, state).start) for p in range(0, 1600, 8) if PromptOrder(8, 5)(p) == hard]
    found = [start for _, start in shares if start is not None]
    assert 0.2 < len(found) / len(shares) < 0.8
    assert all(0.2 <= start.share <= 0.8 and (start.source, start.group) == ("field", -1) for start in found)
    assert all(sampler.decide(p, 0, state).start is None for p in range(400) if PromptOrder(8, 5)(p) == easy)
    state.add(outcome(2, hard, 8, 8, started=True))
    assert state.counted(hard, 0) == (8.0, 0.0)


@given(st.integers(0, 10**6), st.text(max_size=5))
def test_numbers_of_a_position_are_shares(position: int, what: str) -> None:
    assert 0.0 <= uniform(3, position, what) < 1.0
    assert uniform(3, position, what) == uniform(3, position, what)


@given(st.data())
def test_a_decision_is_a_pure_function_of_what_is_known(data: st.DataObject) -> None:
    """Another sampler, that decided other positions before, decides the same."""
    choose = data.draw(st.sampled_from(("band", "thompson", "ucb", "curriculum")))
    given = rules(
        choose=choose,
        candidates=3,
        samples="gvm",
        min_samples=1,
        sources=(0, 1) * 4 if choose == "ucb" else (),
        half_life=2.0,
    )
    rows = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 8), st.integers(0, 5)), max_size=12))
    outcomes = [outcome(n, p, 8, good, version=v) for n, (p, good, v) in enumerate(rows)]
    states = [Statistics(given), Statistics(given)]
    samplers = [Sampler(given), Sampler(given)]
    for position in data.draw(st.lists(st.integers(0, 50), max_size=5)):
        samplers[1].decide(position, 0, Statistics(given))
    for state in states:
        state.replay([], outcomes)
    position, version = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, 9))
    first, second = (s.decide(position, version, k) for s, k in zip(samplers, states, strict=True))
    assert first == second


# ---------------------------------------------------------------- ragged groups in the state machine


def permits_of(effects: list[do.Effect]) -> list[msg.Permit]:
    return [
        p for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits) for p in e.message.permits
    ]


@given(policies(), st.integers(0, 1000))
def test_the_bound_on_staleness_does_not_depend_on_the_sizes_of_groups(policy: Policy, seed: int) -> None:
    """The proofs of staleness.py count groups. Here each has another size, and every trained token is young enough."""
    core = make_core(policy, group_size=4, sampler=rules(problems=20, samples="gvm", min_samples=1, size=4))
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    held: list[tuple[msg.Permit, int]] = []
    version = 0
    versions: dict[int, list[int]] = {}

    def take(effects: list[do.Effect]) -> None:
        for permit in permits_of(effects):
            held.extend((permit, sample) for sample in permit.samples)
        for effect in effects:
            if isinstance(effect, do.FormBatch):
                for group in effect.groups:
                    assert effect.step - min(versions[group]) <= policy.max_staleness
                    assert len(versions[group]) == core_sizes[group]

    core_sizes: dict[int, int] = {}
    take(core.handle(b"g", msg.Want(limit=1000, version=0), 0.0))
    for step in range(6):
        take(core.handle(TRAINER, msg.NextBatch(step=step), 0.0))
        while core.step == step and held:
            permit, sample = held.pop(uniform_index(seed, len(held)))
            core_sizes[permit.group] = core_sizes.get(permit.group, 0) + 1
            versions.setdefault(permit.group, []).append(version)
            reward = float(uniform(seed, 31 * permit.problem + sample, "r") < permit.problem / 20)
            done = answer(permit, sample, version, reward=reward)
            take(core.handle(b"g", msg.Finished(trajectories=(done,)), 0.0))
        if core.step == step:
            break
        version = step + 1
        take(core.handle(TRAINER, msg.Published(version=version), 0.0))
        take(core.handle(b"g", msg.Holds(version=version), 0.0))
        take(core.handle(b"g", msg.Want(limit=1000 * (step + 2), version=version), 0.0))
    assert core.step >= 1


def uniform_index(seed: int, many: int) -> int:
    return int(uniform(seed, many, "place") * many)


def test_a_decision_is_stored_behind_its_group_and_before_its_permit() -> None:
    core = make_core(
        PACE, sampler=rules(choose="band", candidates=2, samples="adaptive", size=2, start="field", start_field="x")
    )
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    out = core.handle(b"g", msg.Want(limit=1, version=0), 0.0)
    kinds = [type(effect).__name__ for effect in out]
    assert kinds == ["AddGroup", "AddDecision", "Send"]
    (permit,) = permits_of(out)
    assert permit.start is not None
    assert permit.start.field == "x"


@pytest.mark.parametrize(
    ("info", "turns", "said"),
    [
        ({}, 0, "with a start"),
        ({GIVEN: "x"}, 0, "what was given to it is 'x'"),
        ({GIVEN: "1+1"}, 0, "it samples what was given to it"),
        ({GIVEN: "1+9"}, 0, "a stretch at 1+9 is out of order or outside its first context"),
    ],
)
def test_an_answer_that_does_not_begin_as_permitted_is_refused(info: dict[str, str], turns: int, said: str) -> None:
    core = make_core(PACE, sampler=rules(size=2, start="field", start_field="x"))
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    (permit,) = permits_of(core.handle(b"g", msg.Want(limit=1, version=0), 0.0))
    out = core.handle(b"g", msg.Finished(trajectories=(answer(permit, 0, 0, info=info),)), 0.0)
    (refused,) = [e.message for e in out if isinstance(e, do.Send) and isinstance(e.message, msg.Refused)]
    assert refused.reason.endswith(said)
    good = answer(permit, 0, 0, info={GIVEN: "0+1~"})
    out = core.handle(b"g", msg.Finished(trajectories=(good,)), 0.0)
    assert any(isinstance(effect, do.AddTrajectories) for effect in out)


def group_of(core: Core, permit: msg.Permit, rewards: list[float]) -> list[do.Effect]:
    out: list[do.Effect] = []
    for sample, reward in enumerate(rewards):
        done = answer(permit, sample, 0, reward=reward)
        out += core.handle(b"g", msg.Finished(trajectories=(done,)), 0.0)
    return out


def test_groups_outside_the_band_are_refused_and_replaced_one_for_one() -> None:
    """DAPO's dynamic sampling and online difficulty filtering: every batch is full, of groups in the band."""
    core = make_core(PACE, group_size=4, sampler=rules(size=4, refuse_outside=True, low=0.3, high=0.7))
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    permits = permits_of(core.handle(b"g", msg.Want(limit=100, version=0), 0.0))
    assert len(permits) == 4
    for rewards, kept in (([1.0] * 4, False), ([1.0, 0, 0, 0], False), ([1.0, 1.0, 0, 0], True)):
        out = group_of(core, permits.pop(0), rewards)
        refused = [e.reason for e in out if isinstance(e, do.RefuseGroup)]
        assert refused == ([] if kept else [f"out_of_band: {int(sum(rewards))} of 4 succeeded"])
        new = permits_of(out)
        assert len(new) == (0 if kept else 1)
        permits += new
    out = group_of(core, permits.pop(0), [1.0, 1.0, 0, 0])
    assert [e.step for e in out if isinstance(e, do.FormBatch)] == [0]
