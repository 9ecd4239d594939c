"""The buffer's state machine on a virtual clock: random speeds, losses and orders of arrival."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import TRAINER, answer, make_core, paces, policies, trajectory
from support_world import ON_ITS_OWN, deaths, make_world, play

from async_rl.buffer import effects as do
from async_rl.buffer.staleness import PacePolicy, Policy, Slot, SlotQueue
from async_rl.errors import UserError
from async_rl.wire import messages as msg


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    policy=policies(),
    generators=st.integers(1, 4),
    loss=st.booleans(),
    failure=st.sampled_from([0.0, 0.05]),
    spread=st.sampled_from([1.0, 30.0]),
    drop=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_staleness_is_bounded_and_each_admitted_group_is_trained_once_or_refused(
    policy: Policy, generators: int, loss: bool, failure: float, spread: float, drop: bool, seed: int
) -> None:
    world = make_world(
        policy,
        seed=seed,
        steps=8,
        generators=generators,
        **ON_ITS_OWN,
        drop_zero_signal=drop,
        failure=failure,
        spread=spread,
        faults=deaths("kill generator", 20 if loss else 0, seed),
    )
    seen = play(world)
    trained, core = seen.batched, world.buffer.core
    assert len(trained) == len(set(trained)) == 8 * policy.groups_per_step
    in_flight = set(core.groups)
    assert set(seen.asked) == set(trained) | set(seen.refused) | in_flight
    assert not set(trained) & set(seen.refused)
    assert not in_flight & set(trained)
    assert core.counts["groups_admitted"] == len(seen.asked)
    assert core.counts["groups_trained"] == len(trained)
    assert core.counts["groups_refused"] == len(seen.refused)
    stale = [group for group, reason in seen.refused.items() if reason.startswith("stale")]
    # pacing and waiting admit nothing that would have to be refused for its age
    assert policy.refills or not stale
    assert core.counts["refused_stale"] == len(stale)
    seen.check_prompts(core)
    assert len(core.ledger.queue.entries) >= len(core.groups) == core.ledger.queue.live


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pace=paces(), data=st.data())
def test_no_group_is_overtaken_by_more_than_the_window_allows(pace: PacePolicy, data: st.DataObject) -> None:
    line = SlotQueue()
    for group in range(60):
        line.add(Slot(group=group, deadline=0))
    batch_of: dict[int, int] = {}
    step = 0
    finish_order = data.draw(st.permutations(range(60)))
    for group in finish_order:
        line.finish(group, deadline=0)
        while (chosen := pace.select(line, step=step)) is not None:
            line.train(chosen)
            batch_of |= dict.fromkeys(chosen, step)
            step += 1
    for group, at in batch_of.items():
        assert at <= pace.latest_step(ahead=group, step=0)


def test_the_same_messages_at_the_same_times_give_the_same_effects() -> None:
    def play() -> list[str]:
        core = make_core(PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1))
        out: list[do.Effect] = []
        out += core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
        out += core.handle(b"g", msg.Want(limit=4, version=0), 0.1)
        out += core.handle(TRAINER, msg.NextBatch(step=0), 0.2)
        for group in (1, 0):
            for sample in (0, 1):
                done = trajectory(group, sample, 0)
                out += core.handle(b"g", msg.Finished(trajectories=(done,)), 1.0)
        return [type(e).__name__ for e in out]

    assert play() == play()
    assert play()[-1] == "SendBatch"


def test_a_batch_is_formed_once_and_answered_identically_when_asked_again() -> None:
    core = make_core(PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0, window=1), group_size=1)
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    for group in (0, 1):
        core.handle(b"g", msg.Finished(trajectories=(trajectory(group, 0, 0),)), 0.0)
    first = core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    again = core.handle(TRAINER, msg.NextBatch(step=0), 1.0)
    assert [e.step for e in first + again if isinstance(e, do.SendBatch)] == [0, 0]
    assert [e.groups for e in first + again if isinstance(e, do.FormBatch)] == [(0,)]


def test_no_more_tokens_are_trained_than_generated_whenever_generators_said_it_last() -> None:
    core = make_core(PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0, window=1), group_size=1)
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    core.handle(b"g", msg.Finished(trajectories=(trajectory(0, 0, 0),)), 0.0)
    sent = core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    (batch,) = (effect for effect in sent if isinstance(effect, do.SendBatch))
    assert batch.counters.tokens_generated == 1, "it has told of none yet"
    core.admission.generators[b"g"].tokens_generated = 5  # two episodes more are under way
    assert core.counters().tokens_generated == 5


def test_a_trajectory_that_is_too_old_is_refused_when_the_batch_is_formed() -> None:
    core = make_core(PacePolicy(groups_per_step=1, max_staleness=0, pipeline_depth=1.0, window=1), group_size=1)
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    core.handle(b"g", msg.Finished(trajectories=(trajectory(0, 0, 0),)), 0.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    core.handle(TRAINER, msg.Published(version=1), 0.0)
    core.handle(b"g", msg.Holds(version=1), 0.0)
    # a generator that claims version 1 but answers with tokens of version 0
    old = msg.Finished(trajectories=(trajectory(1, 0, 0),))
    core.handle(b"g", old, 0.0)
    assert core.refusals.counts == {"version": 1}
    assert core.groups[1].missing == (0,)
    # of a group read from the store it is not known what its generators held
    core.groups[1].oldest_held = 0
    core.handle(b"g", old, 0.0)
    effects = core.handle(TRAINER, msg.NextBatch(step=1), 0.0)
    refused = [e for e in effects if isinstance(e, do.RefuseGroup)]
    assert [r.group for r in refused] == [1]
    assert refused[0].reason.startswith("stale: version 0 at step 1")
    assert not any(isinstance(e, do.SendBatch) for e in effects)


def test_zero_signal_groups_free_their_slot_at_once() -> None:
    core = make_core(
        PacePolicy(groups_per_step=1, max_staleness=0, pipeline_depth=1.0, window=1), drop_zero_signal=True
    )
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    assert list(core.groups) == [0]
    pair = tuple(trajectory(0, s, 0, reward=1.0) for s in (0, 1))
    effects = core.handle(b"g", msg.Finished(trajectories=pair), 0.0)
    assert [e.reason for e in effects if isinstance(e, do.RefuseGroup)] == ["zero_signal"]
    assert list(core.groups) == [1], "the next group starts although no batch was trained"


def test_failures_in_a_row_end_the_run_with_the_last_reason() -> None:
    core = make_core(
        PacePolicy(groups_per_step=1, max_staleness=0, pipeline_depth=1.0, window=1), group_size=3, max_failures=3
    )
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    bad = tuple(trajectory(0, s, 0, ended="error", reason="RewardError: boom") for s in range(3))
    effects = core.handle(b"g", msg.Finished(trajectories=bad), 0.0)
    ends = [e for e in effects if isinstance(e, do.EndRun)]
    assert len(ends) == 1
    assert ends[0].failed
    assert "RewardError: boom" in ends[0].reason


def test_an_evaluation_runs_between_training_groups_and_is_not_trained() -> None:
    core = make_core(PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0, window=1))
    core.handle(b"g", msg.Hello(role="generator", name="g", pid=1), 0.0)
    ask = msg.Evaluate(evaluation=0, version=0, problems=(5, 6), samples=2, temperature=0.0)
    core.handle(TRAINER, ask, 0.0)
    core.handle(TRAINER, ask, 0.0)
    effects = core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    permits = next(e.message.permits for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits))
    assert [(p.split, p.problem) for p in permits] == [("eval", 5), ("eval", 6), ("train", 0), ("train", 1)]
    for permit in permits[:2]:
        for s in permit.samples:
            done = answer(permit, s, 0, reward=0.5)
            core.handle(b"g", msg.Finished(trajectories=(done,)), 0.0)
    recorded, told = core.handle(TRAINER, msg.FetchEvaluation(evaluation=0), 2.0)
    assert isinstance(recorded, do.AddEvaluation)
    assert isinstance(told, do.Send)
    assert isinstance(told.message, msg.EvaluationResult)
    assert told.message.finished
    assert told.message.rewards == (0.5,) * 4
    assert core.step == 0


def test_a_failed_held_out_episode_has_no_reward_and_its_reason_is_told() -> None:
    core = make_core(PacePolicy(groups_per_step=2, max_staleness=0, pipeline_depth=1.0, window=1))
    core.handle(b"g", msg.Hello(role="generator", name="generator-0", pid=1), 0.0)
    ask = msg.Evaluate(evaluation=0, version=0, problems=(5,), samples=2, temperature=0.0)
    core.handle(TRAINER, ask, 0.0)
    effects = core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    permits = next(e.message.permits for e in effects if isinstance(e, do.Send) and isinstance(e.message, msg.Permits))
    for sample, changes in enumerate(({"reward": 0.5}, {"ended": "error", "reason": "KeyError: form"})):
        core.handle(b"g", msg.Finished(trajectories=(answer(permits[0], sample, 0, **changes),)), 0.0)
    _, told = core.handle(TRAINER, msg.FetchEvaluation(evaluation=0), 2.0)
    assert isinstance(told, do.Send)
    assert isinstance(told.message, msg.EvaluationResult)
    assert told.message.finished
    assert [str(reward) for reward in told.message.rewards] == ["0.5", "nan"]
    assert told.message.failures == ("KeyError: form",)


def test_a_waiting_trainer_is_told_whom_it_waits_for() -> None:
    core = make_core(PacePolicy(groups_per_step=2, max_staleness=0, pipeline_depth=1.0, window=1))
    core.handle(b"g", msg.Hello(role="generator", name="generator-0", pid=1), 0.0)
    core.handle(b"g", msg.Want(limit=9, version=0), 0.0)
    core.handle(b"g", msg.Finished(trajectories=(trajectory(0, 0, 0),)), 1.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 2.0)
    effects = core.tick(12.0)
    assert isinstance(effects[0], do.Send)
    assert isinstance(effects[0].message, msg.Waiting)
    text = effects[0].message.reason
    assert "0 of 2 groups finished" in text
    assert "group 0 on generator-0, 12.0 s, 1/2 samples" in text


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"pipeline_depth": 3.0}, "pipeline_depth"),
        ({"window": 6}, "window"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"groups_per_step": 0}, "groups_per_step"),
    ],
)
def test_settings_that_cannot_keep_the_bound_are_refused(changes: dict[str, float], name: str) -> None:
    values = {"groups_per_step": 4, "max_staleness": 1, "pipeline_depth": 2.0, "window": 1}
    with pytest.raises(UserError, match=name):
        PacePolicy(**{**values, **changes})  # type: ignore[arg-type]
