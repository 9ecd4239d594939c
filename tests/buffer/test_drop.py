"""Drop: what is too old goes at once, is asked again exactly, and is counted by length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import TRAINER, answer, drops, make_core
from support_world import ON_ITS_OWN, deaths, make_world, play

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.loop import write
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.staleness import DropPolicy, PacePolicy, WaitPolicy
from async_rl.buffer.store import Store
from async_rl.trajectory import Trajectory, Turn, VersionSpan
from async_rl.wire import messages as msg


def long(permit: msg.Permit, sample: int, version: int, tokens: int, **changes: object) -> Trajectory:
    """An answer of so many policy tokens."""
    made: dict[str, object] = {
        "tokens": np.ones(tokens + 1, np.int32),
        "log_behaviour": np.full(tokens + 1, -1.0, np.float32),
        "turns": (Turn(start=1, length=tokens),) if tokens else (),
        "versions": (VersionSpan(version=version, start=1, end=tokens + 1),) if tokens else (),
    }
    return answer(permit, sample, version, **{**made, **changes})


class Play:
    """One generator that answers what it is told to, a trainer, and everything that was asked of the surroundings."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.effects: list[do.Effect] = []
        self.permits: dict[int, msg.Permit] = {}
        self.hear(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1))
        self.hear(b"g", msg.Hello(role="generator", name="g", pid=1))
        self.hear(b"g", msg.Want(limit=100, version=0))

    def hear(self, peer: bytes, message: msg.Message) -> list[do.Effect]:
        found = self.core.handle(peer, message, 0.0)
        self.effects += found
        for effect in found:
            if isinstance(effect, do.Send) and isinstance(effect.message, msg.Permits):
                self.permits |= {permit.group: permit for permit in effect.message.permits}
        return found

    def finish(self, group: int, version: int, tokens: int, **changes: object) -> list[do.Effect]:
        permit = self.permits[group]
        done = tuple(long(permit, sample, version, tokens, **changes) for sample in permit.samples)
        return self.hear(b"g", msg.Finished(trajectories=done))

    def publish(self, version: int) -> None:
        self.hear(TRAINER, msg.Published(version=version))
        self.hear(b"g", msg.Holds(version=version))


def overdue_play() -> tuple[Play, list[do.Effect]]:
    """P = 1, k = 1: groups 0 and 1 start at version 0; 1 and then 2, of version 1, are trained before 0 is done."""
    play = Play(make_core(DropPolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0)))
    play.finish(1, 0, tokens=10)
    play.hear(TRAINER, msg.NextBatch(step=0))
    play.publish(1)
    play.finish(2, 1, tokens=30)
    return play, play.hear(TRAINER, msg.NextBatch(step=1))


def dropped_metrics(core: Core) -> dict[str, float]:
    counters = core.counters().dropped
    assert counters is not None
    return counters.metrics()


def test_a_running_group_that_can_no_longer_be_trained_gives_its_slot_up_and_is_asked_again_at_once() -> None:
    play, effects = overdue_play()
    assert [e.groups for e in effects if isinstance(e, do.FormBatch)] == [(2,)]
    (refused,) = [e for e in effects if isinstance(e, do.RefuseGroup)]
    assert refused.group == 0
    assert refused.reason.startswith("stale: admitted at version 0, not finished when step 2 was due (0 of 2 samples")
    assert [e.message for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Abandon)] == [
        msg.Abandon(groups=(0,))
    ]
    admitted = [e for e in effects if isinstance(e, do.AddGroup)]
    assert [(e.problem, e.position, e.attempt) for e in admitted] == [(0, 0, 1)], "its problem, before any new one"
    first, second = play.permits[0], play.permits[admitted[0].group]
    assert first.problem == second.problem
    assert first.seed != second.seed, "with noise of its own"
    again, _ = overdue_play()
    assert again.permits[admitted[0].group] == second, "which does not depend on timing"


def test_what_was_generated_of_a_dropped_group_is_stored_and_counted(tmp_path: Path) -> None:
    play, _ = overdue_play()
    permit = play.permits[0]
    late = [
        long(permit, 0, 0, 90, ended="aborted", reason=msg.ABANDONED),
        long(permit, 1, 0, 0, ended="aborted", reason=msg.ABANDONED),  # it had not begun
    ]
    play.hear(b"g", msg.Finished(trajectories=(late[0],)))
    play.hear(b"g", msg.Finished(trajectories=(late[0], late[1])))  # the first one twice
    numbers = dropped_metrics(play.core)
    assert numbers["drop/groups"] == 1
    assert (numbers["drop/trajectories"], numbers["drop/tokens"], numbers["drop/len_mean"]) == (1, 90, 90.0)
    assert numbers["drop/len_trained"] == 20.0
    assert numbers["drop/len_bias"] == 4.5
    assert {k: v for k, v in numbers.items() if "below" in k} == {
        "drop/below_256": 1, "drop/trained_below_16": 2, "drop/trained_below_64": 2
    }  # fmt: skip
    assert play.core.counts["trajectories_failed"] == play.core.failures_in_row == 0
    again = make_core(play.core.rules.policy)
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        for effect in play.effects:
            write(effect, store)
        store.commit()
        dropped = [row for row in store.trajectories() if row.group == 0]
        assert [row.policy_length for row in dropped] == [90, 0]
        assert all((row.refused_because or "").startswith("stale: admitted") for row in dropped)
        restore(again, read_state(store), version=2)
    assert dropped_metrics(again) == numbers, "and known again after a restart"
    assert again.counts["trajectories_failed"] == 0


def test_a_stranger_cannot_add_to_what_was_dropped() -> None:
    play, _ = overdue_play()
    play.hear(b"other", msg.Hello(role="generator", name="other", pid=1))
    play.hear(b"other", msg.Finished(trajectories=(long(play.permits[0], 0, 0, 90),)))
    assert dropped_metrics(play.core)["drop/trajectories"] == 0
    assert play.core.refusals.counts.total() == 1


def test_what_waits_to_be_asked_again_is_known_after_a_restart(tmp_path: Path) -> None:
    play = Play(make_core(DropPolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0)))
    play.finish(1, 0, tokens=10)
    play.hear(TRAINER, msg.NextBatch(step=0))
    play.publish(1)
    play.finish(2, 1, tokens=30)
    play.hear(b"g", msg.Hello(role="generator", name="g", pid=2))  # it came back, and takes nothing
    play.hear(TRAINER, msg.NextBatch(step=1))
    assert play.core.admission.refill == [(0, 1)]
    again = make_core(play.core.rules.policy)
    with Store(tmp_path / "trajectories.sqlite", durability="process", create=True) as store:
        for effect in play.effects:
            write(effect, store)
        store.commit()
        restore(again, read_state(store), version=2)
    assert again.admission.refill == [(0, 1)]
    assert again.admission.position == play.core.admission.position


def test_a_run_that_drops_everything_ends_with_the_reason() -> None:
    core = make_core(DropPolicy(groups_per_step=1, max_staleness=0, pipeline_depth=1.0), max_refusals=3)
    play = Play(core)
    core.ledger.step = 5  # whatever is running now is too old
    effects = play.hear(TRAINER, msg.NextBatch(step=5))
    assert [e.reason.split(":")[0] for e in effects if isinstance(e, do.RefuseGroup)] == ["stale"]
    for version in (5, 6):
        core.ledger.step = version
        play.publish(version)
        core.ledger.step = version + 1
        effects = play.hear(TRAINER, msg.NextBatch(step=version + 1))
    (end,) = [e for e in effects if isinstance(e, do.EndRun)]
    assert end.failed
    assert end.reason.startswith("3 groups in a row were refused, the last because: stale: ")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(policy=drops(), generators=st.integers(1, 4), loss=st.booleans(), seed=st.integers(0, 2**32))
def test_every_prompt_is_trained_in_the_end_and_none_twice(
    policy: DropPolicy, generators: int, loss: bool, seed: int
) -> None:
    world = make_world(
        policy,
        seed=seed,
        steps=25,
        generators=generators,
        **ON_ITS_OWN,
        spread=30.0,
        faults=deaths("kill generator", 20 if loss else 0, seed, until_s=40.0),
    )
    seen, core = play(world), world.buffer.core
    trained = Counter(seen.asked[group][0] for group in seen.batched)
    assert set(trained.values()) == {1}
    seen.check_prompts(core)
    # what of the prefix was not trained yet is under way or next
    missing = set(range(core.admission.position)) - set(trained)
    under_way = {seen.asked[group][0] for group in core.groups}
    assert missing == under_way | {position for position, _ in core.admission.refill}
    assert len(missing) <= policy.slots + len(core.admission.refill)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 6), kind=st.sampled_from([PacePolicy, WaitPolicy, DropPolicy]), generators=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_without_staleness_every_policy_trains_the_prompt_order(
    groups: int, kind: type[PacePolicy] | type[WaitPolicy] | type[DropPolicy], generators: int, seed: int
) -> None:
    window = {"window": 1} if kind is PacePolicy else {}
    policy = kind(groups_per_step=groups, max_staleness=0, pipeline_depth=1.0, **window)
    world = make_world(
        policy,
        seed=seed,
        steps=6,
        generators=generators,
        **ON_ITS_OWN,
        spread=30.0,
        faults=deaths("kill generator", 12, seed, until_s=8.0),
    )
    seen = play(world)
    assert [seen.asked[group] for group in seen.batched] == [(p, 0) for p in range(6 * groups)]
    assert not seen.refused


@pytest.mark.parametrize(("tokens", "bias"), [(0, None), (5, 0.25), (200, 10.0)])
def test_a_bias_is_told_when_lengths_of_dropped_trajectories_are_known(tokens: int, bias: float | None) -> None:
    play, _ = overdue_play()
    for sample in range(2):
        play.hear(b"g", msg.Finished(trajectories=(long(play.permits[0], sample, 0, tokens),)))
    assert dropped_metrics(play.core).get("drop/len_bias") == bias
