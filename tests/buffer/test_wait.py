"""Wait: whatever is admitted can still be trained in time, and is, against a search over all schedules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support_buffer import TRAINER, make_core, trajectory

from async_rl.buffer import effects as do
from async_rl.buffer.staleness import Slot, SlotQueue, WaitPolicy
from async_rl.wire import messages as msg


def line_of(deadlines: Sequence[int], finished: Sequence[bool]) -> SlotQueue:
    line = SlotQueue()
    for group, (deadline, done) in enumerate(zip(deadlines, finished, strict=True)):
        line.add(Slot(group=group, deadline=deadline))
        if done:
            line.finish(group, deadline=deadline)
    return line


def schedulable(deadlines: Sequence[int], step: int, groups: int) -> bool:
    """Is there any way to train all of them in time, `groups` a step from `step` on? By trying every batch; a
    batch may also be filled up with groups that are admitted later."""
    if not deadlines:
        return True
    if min(deadlines) < step:
        return False
    return any(
        schedulable([d for i, d in enumerate(deadlines) if i not in batch], step + 1, groups)
        for size in range(groups + 1)
        for batch in combinations(range(len(deadlines)), size)
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(deadlines=st.lists(st.integers(0, 3), max_size=5), groups=st.integers(1, 2), k=st.integers(0, 3), data=st.data())
def test_a_group_is_admitted_just_when_all_can_still_be_trained_in_time(
    deadlines: list[int], groups: int, k: int, data: st.DataObject
) -> None:
    if not schedulable(deadlines, 0, groups):
        return
    wait = WaitPolicy(groups_per_step=groups, max_staleness=k, pipeline_depth=k + 1.0)
    version = data.draw(st.integers(-k - 1, 0))  # of the generator; the next step is 0
    admitted = wait.admit(line_of(deadlines, [False] * len(deadlines)), step=0, version=version, published=0)
    free = len(deadlines) < (k + 1) * groups
    assert admitted == (free and schedulable([*deadlines, version + k], 0, groups))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(groups=st.integers(1, 2), live=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6))
def test_a_batch_is_formed_just_when_some_finished_groups_leave_the_rest_in_time(
    groups: int, live: list[tuple[int, bool]]
) -> None:
    deadlines, finished = [d for d, _ in live], [f for _, f in live]
    if not schedulable(deadlines, 0, groups):
        return
    wait = WaitPolicy(groups_per_step=groups, max_staleness=3, pipeline_depth=4.0)
    line = line_of(deadlines, finished)
    possible = [
        batch
        for batch in combinations([i for i, done in enumerate(finished) if done], groups)
        if schedulable([d for i, d in enumerate(deadlines) if i not in batch], 1, groups)
    ]
    chosen = wait.select(line, step=0)
    due = wait.held_up_by(line, step=0)
    if chosen is None:
        assert not possible
    else:
        assert tuple(chosen) in possible
    if sum(finished) < groups:
        assert not due
    else:
        assert bool(due) == (chosen is None), "only a running group holds a batch up that could be filled"
        assert not any(finished[group] for group in due)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(groups=st.integers(1, 4), k=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_nothing_is_trained_too_late_whoever_is_slow_and_whatever_the_depth(groups: int, k: int, seed: int) -> None:
    """The policy alone: any generator may start, any group may finish, the depth may change, at any moment."""
    random = Random(seed)
    wait = WaitPolicy(groups_per_step=groups, max_staleness=k, pipeline_depth=k + 1.0)
    line, step, published, number = SlotQueue(), 0, 0, 0
    held = [0] * 3  # versions of the generators
    oldest: dict[int, int] = {}
    for _ in range(400):
        match random.randrange(6):
            case 0:
                wait = wait.at_depth(random.uniform(1, k + 1))
            case 1:
                published = min(step, published + 1)
            case 2:
                held[random.randrange(3)] = published
            case 3 | 4:
                version = random.choice(held)
                if wait.admit(line, step=step, version=version, published=published):
                    line.add(Slot(group=number, deadline=version + k))
                    # a token may be younger than the weights its group was admitted with
                    oldest[number] = random.randint(version, published)
                    number += 1
            case _:
                running = [e.group for e in line.entries if not e.finished]
                if running:
                    group = random.choice(running)
                    line.finish(group, deadline=oldest[group] + k)
        if not random.randrange(2) and (chosen := wait.select(line, step=step)) is not None:
            assert all(step - oldest[group] <= k for group in chosen)
            line.train(chosen)
            step += 1
        assert wait.overdue(line, step=step) == []
        assert all(e.deadline >= step for e in line.entries if not e.trained)
    # nobody waits for ever: once all is finished, batches are formed as long as there are groups for them
    for entry in [e for e in line.entries if not e.finished]:
        line.finish(entry.group, deadline=oldest[entry.group] + k)
    while line.live >= groups:
        chosen = wait.select(line, step=step)
        assert chosen is not None
        assert all(step - oldest[group] <= k for group in chosen)
        line.train(chosen)
        step += 1


def test_a_batch_that_waits_for_a_due_group_says_for_whom_and_counts() -> None:
    core = make_core(WaitPolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0), group_size=1)
    for peer in (b"slow", b"fast"):
        core.handle(peer, msg.Hello(role="generator", name=peer.decode(), pid=1), 0.0)
        core.handle(peer, msg.Want(limit=1, version=0), 0.0)
    core.handle(TRAINER, msg.Hello(role="trainer", name="trainer", pid=1), 0.0)
    slow, fast = (next(g for g, group in core.groups.items() if group.holder == peer) for peer in (b"slow", b"fast"))
    core.handle(b"fast", msg.Finished(trajectories=(trajectory(fast, 0, 0),)), 1.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 1.0)  # the slow one may still be trained at step 1
    core.handle(TRAINER, msg.Published(version=1), 2.0)
    core.handle(b"fast", msg.Holds(version=1), 2.0)
    core.handle(b"fast", msg.Want(limit=2, version=1), 2.0)
    core.handle(b"fast", msg.Finished(trajectories=(trajectory(2, 0, 1),)), 3.0)
    effects = core.handle(TRAINER, msg.NextBatch(step=1), 4.0)
    assert not any(isinstance(e, do.FormBatch) for e in effects), "then the slow one would be too late"
    effects = core.handle(b"slow", msg.Finished(trajectories=(trajectory(slow, 0, 0),)), 9.0)
    assert [e.groups for e in effects if isinstance(e, do.FormBatch)] == [(slow,)]
    (note,) = [e for e in effects if isinstance(e, do.Note)]
    assert (note.event.event, note.event.detail()) == (
        "held_up", {"step": 1, "seconds": 5.0, "groups": (slow,), "generators": ("slow",)}
    )  # fmt: skip
    numbers = core.counters().metrics()
    assert (numbers["held_up/batches"], numbers["held_up/seconds"], numbers["held_up/by/slow"]) == (1, 5.0, 1)
    assert not core.counts["groups_refused"]
