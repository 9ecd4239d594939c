"""The controller of the pipeline's depth: it finds the target, stays there, and never leaves its bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import exp, inf, nan
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import TRAINER, make_core, policies
from support_world import ON_ITS_OWN, Invariants, deaths, make_world, play

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.depth import CALM_STEPS, LEAST_STEPS, DepthControl, DepthState
from async_rl.buffer.loop import write
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.staleness import PacePolicy, Policy
from async_rl.buffer.store import Store
from async_rl.events import DepthChanged
from async_rl.wire import messages as msg

Plant = Callable[[int, float], float]
"""(step, depth of the data) -> ESS / B"""


def simulate(
    control: DepthControl, plant: Plant, *, steps: int, depth: float, noise: float, seed: int, first: int = 0,
    state: DepthState | None = None,
) -> tuple[DepthState, list[DepthChanged]]:  # fmt: skip
    """A training whose batches were started one pipeline earlier, at the depth there was then."""
    random = Random(seed)
    state = state or control.start(depth)
    depths = [state.depth]
    decisions = []
    for step in range(first, first + steps):
        made_at = depths[max(0, len(depths) - 1 - round(depths[-1]))]
        ess = min(1.0, max(0.0, plant(step, made_at) + random.gauss(0.0, noise)))
        state, decision = control.observe(state, step=step, ess=ess)
        if decision is not None:
            decisions.append(decision)
        depths.append(state.depth)
    return state, decisions


def falling(rate: float) -> Plant:
    """Data from a pipeline `depth` batches deep are `depth - 1` steps old."""
    return lambda step, depth: exp(-rate * (depth - 1))


@pytest.mark.parametrize("start", [1.0, 3.0, 9.0])
@pytest.mark.parametrize(("rate", "target"), [(0.1, 0.7), (0.2, 0.5), (0.35, 0.3), (0.5, 0.6)])
def test_the_ess_comes_into_the_band_and_the_depth_then_rests(rate: float, target: float, start: float) -> None:
    control = DepthControl(target=target, deepest=9.0, groups_per_step=16)
    for seed in range(10):
        state, decisions = simulate(control, falling(rate), steps=1000, depth=start, noise=0.04, seed=seed)
        settled, later = simulate(
            control, falling(rate), steps=1000, depth=start, noise=0.04, seed=seed + 100, first=1000, state=state
        )
        assert len(decisions) <= 16
        assert len(later) <= 6
        assert falling(rate)(0, settled.depth) == pytest.approx(target, abs=control.band + 0.03)


@pytest.mark.parametrize("groups", [1, 4])
def test_between_two_neighbouring_depths_the_shallower_is_kept(groups: int) -> None:
    # one slot more takes the ESS from far above the band to far below it
    control = DepthControl(target=0.5, deepest=5.0, groups_per_step=groups)
    edge = 2 + 0.5 / groups

    def cliff(step: int, depth: float) -> float:
        return 0.58 if depth < edge else 0.2

    state, decisions = simulate(control, cliff, steps=3000, depth=5.0, noise=0.02, seed=1)
    assert 1 <= state.depth < edge < state.depth + 1 / groups
    # it is found once; then the deeper neighbour is tried after 40, 80, 160, ... steps
    assert len(decisions) <= 6 + 2 * 6


def test_after_a_shock_the_target_is_found_again() -> None:
    control = DepthControl(target=0.5, deepest=9.0, groups_per_step=16)

    def plant(step: int, depth: float) -> float:
        return falling(0.12 if step < 500 or step >= 1000 else 0.4)(step, depth)

    state, decisions = simulate(control, plant, steps=500, depth=9.0, noise=0.03, seed=3)
    before = state.depth
    assert plant(499, before) == pytest.approx(0.5, abs=0.08)
    state, decisions = simulate(control, plant, steps=150, depth=0, noise=0.03, seed=4, first=500, state=state)
    assert plant(649, state.depth) == pytest.approx(0.5, abs=0.08), "within 150 steps"
    assert all(decision.new < decision.old for decision in decisions[:3])
    state, _ = simulate(control, plant, steps=850, depth=0, noise=0.03, seed=5, first=650, state=state)
    assert state.depth == pytest.approx(before, abs=1.0), "and back"


def test_a_target_out_of_reach_is_said_once_and_nothing_winds_up() -> None:
    control = DepthControl(target=0.9, deepest=4.0, groups_per_step=4)
    state, decisions = simulate(control, lambda step, depth: 0.3, steps=2000, depth=4.0, noise=0.01, seed=0)
    assert state.depth == 1.0
    *moves, last = decisions
    assert last.reason.endswith("the depth is at its bound")
    assert all(move.new < move.old for move in moves)
    # the first good steps count at once, however long it was bad
    state, decisions = simulate(
        control, lambda step, depth: 0.99, steps=40, depth=0, noise=0.0, seed=0, first=2000, state=state
    )
    assert decisions
    assert decisions[0].new > 1.0


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_an_ess_that_is_no_number_makes_the_pipeline_shallower_and_is_counted(bad: float) -> None:
    control = DepthControl(target=0.5, deepest=5.0, groups_per_step=4)
    state, decision = control.observe(control.start(3.0), step=0, ess=bad)
    assert decision is not None
    assert decision.new < 3.0
    assert decision.reason == "the ESS is not finite"
    assert state.nonfinite == 1
    # those of the same pipeline are counted and not punished again
    state, decision = control.observe(state, step=1, ess=bad)
    assert decision is None
    assert state.nonfinite == 2


def test_a_step_that_is_trained_again_after_a_restart_counts_once() -> None:
    control = DepthControl(target=0.5, deepest=5.0, groups_per_step=4)
    state = control.start(3.0)
    for step in range(LEAST_STEPS - 1):
        state, _ = control.observe(state, step=step, ess=0.1)
    assert control.observe(state, step=LEAST_STEPS - 2, ess=0.1) == (state, None)
    _, decision = control.observe(state, step=LEAST_STEPS - 1, ess=0.1)
    assert decision is not None


observed = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([nan, inf, 0.0, 1.0])), max_size=400)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    target=st.floats(0.001, 0.999), k=st.integers(1, 8), p=st.integers(1, 64), start=st.floats(0, 1), shares=observed
)
def test_the_depth_stays_within_its_bounds_and_changes_are_far_apart(
    target: float, k: int, p: int, start: float, shares: list[float]
) -> None:
    control = DepthControl(target=target, deepest=k + 1.0, groups_per_step=p)
    state = control.start(1 + start * k)
    changes = []
    for step, ess in enumerate(shares):
        before = state.depth
        state, decision = control.observe(state, step=step, ess=ess)
        assert 1 <= state.depth <= k + 1
        if state.depth != before:
            assert decision is not None
            assert (decision.old, decision.new) == (before, state.depth)
            assert abs(state.depth - before) <= 1.0 + 1 / p
            changes.append(step)
        # the state survives its way through the store
        assert repr(DepthState(**json.loads(json.dumps(asdict(state))))) == repr(state)
    if all(0 <= ess <= 1 for ess in shares):
        assert all(b - a > LEAST_STEPS for a, b in pairwise(changes))
    assert CALM_STEPS > LEAST_STEPS


@dataclass(eq=False, kw_only=True)
class ShakenDepth(Invariants):
    """The depth is set anew at random before every message."""

    random: Random

    def round(self, core: Core) -> None:
        super().round(core)
        policy = core.ledger.policy
        core.ledger.policy = policy.at_depth(self.random.uniform(1, policy.max_staleness + 1))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(policy=policies(), generators=st.integers(1, 4), spread=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 2**32))
def test_the_bound_holds_under_any_sequence_of_depths(
    policy: Policy, generators: int, spread: float, seed: int
) -> None:
    deepest = policy.at_depth(policy.max_staleness + 1.0).slots
    world = make_world(
        policy,
        seed=seed,
        steps=8,
        generators=generators,
        **ON_ITS_OWN,
        watch=ShakenDepth(policy=policy, slots=deepest, random=Random(seed)),
        failure=0.02,
        spread=spread,
        faults=deaths("kill generator", 4, seed),
    )
    seen = play(world)  # asserts the bound at every batch, and that it comes to its end
    assert len(seen.batched) == len(set(seen.batched)) == 8 * policy.groups_per_step
    seen.check_prompts(world.buffer.core)


def test_the_buffer_obeys_the_depth_says_so_and_a_restarted_one_goes_on_with_it(tmp_path: Path) -> None:
    control = DepthControl(target=0.5, deepest=3.0, groups_per_step=4)
    pace = PacePolicy(groups_per_step=4, max_staleness=2, pipeline_depth=3.0, window=1)
    core = make_core(pace, control=control)
    core.handle(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1), 0.0)
    core.ledger.step = 50
    effects: list[do.Effect] = []
    for version in range(LEAST_STEPS + 1):
        # the initial weights, which no batch was trained on, say nothing of an ESS
        ess = {} if version == 0 else {"ess": 0.2}
        effects += core.handle(TRAINER, msg.Published(version=version, **ess), float(version))  # type: ignore[arg-type]
    (note,) = [effect for effect in effects if isinstance(effect, do.Note)]
    assert note.event.event == "depth"
    assert (note.event.step, note.event.old, note.event.new) == (LEAST_STEPS - 1, 3.0, 2.0)
    assert core.ledger.policy.slots == 8
    assert core.counters().metrics()["staleness/depth"] == 2.0
    again = make_core(pace, control=control)
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        for effect in effects:
            write(effect, store)
        store.commit()
        restore(again, read_state(store), version=0)
    assert again.ledger.policy == core.ledger.policy
    assert again.batching.depth is not None
    assert core.batching.depth is not None
    assert repr(again.batching.depth.state) == repr(core.batching.depth.state)
