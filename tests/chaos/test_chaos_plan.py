"""The plan of the faults, the timetable of one, and the progress in a run's files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

from hypothesis import given
from hypothesis import strategies as st

from async_rl.events import ProcessStarted
from async_rl.instruments.chaos.plan import LATEST, LIES, ROLES, Counts, Fault, describe, lie_of, make_plan, timetable
from async_rl.instruments.chaos.progress import RunProgress
from async_rl.run_folder import RunFolder, append_row, replace_text

COUNTS = st.builds(
    Counts,
    kills=st.integers(0, 40), freezes=st.integers(0, 9), slows=st.integers(0, 9), disconnects=st.integers(0, 9),
)  # fmt: skip
SEEDS = st.integers(0, 2**63 - 1)


@given(counts=COUNTS, seed=SEEDS)
def test_a_plan_has_what_was_asked_for_before_the_end(counts: Counts, seed: int) -> None:
    plan = make_plan(counts, seed=seed)
    assert plan == make_plan(counts, seed=seed)
    assert Counter(fault.kind for fault in plan) == Counter(
        kill=counts.kills, freeze=counts.freezes, slow=counts.slows, disconnect=counts.disconnects
    )
    killed = Counter(fault.role for fault in plan if fault.kind == "kill")
    assert all(abs(killed[one] - killed[other]) <= 1 for one in ROLES for other in ROLES)
    moments = [fault.progress for fault in plan]
    assert moments == sorted(moments)
    assert all(0 <= moment <= LATEST for moment in moments)
    assert all((fault.role is None) == (fault.kind == "disconnect") for fault in plan)
    assert sum(fault.endless for fault in plan) == (counts.freezes + 1) // 2


@given(counts=COUNTS, seed=SEEDS)
def test_whoever_is_stopped_goes_on_or_is_ended(counts: Counts, seed: int) -> None:
    for fault in make_plan(counts, seed=seed):
        times = timetable(fault, patience_s=4.0)
        assert [moment for moment, _ in times] == sorted(moment for moment, _ in times)
        signals = [number for _, number in times]
        match fault:
            case Fault(kind="kill"):
                assert times == [(0.0, SIGKILL)]
            case Fault(kind="freeze", endless=True, role="launcher"):
                assert times == [(0.0, SIGSTOP), (4.0, SIGKILL)]  # nobody else watches it
            case Fault(kind="freeze", endless=True):
                assert times == [(0.0, SIGSTOP)]
            case Fault(kind="freeze" | "slow"):
                assert signals == [SIGSTOP, SIGCONT] * (len(signals) // 2)
                assert len(signals) == 2 or fault.kind == "slow"
                assert times[-1][0] <= fault.seconds + 0.2
            case Fault(kind="disconnect"):
                assert times == []


def test_other_seeds_give_other_plans() -> None:
    counts = Counts(kills=8, freezes=2, slows=2, disconnects=2)
    assert len({make_plan(counts, seed=seed) for seed in range(20)}) == 20


def test_a_plan_without_lies_is_as_before_and_lies_are_of_every_kind() -> None:
    plain = make_plan(Counts(kills=8, freezes=2, slows=2, disconnects=2), seed=5)
    assert plain == make_plan(Counts(kills=8, freezes=2, slows=2, disconnects=2, lies=0), seed=5)
    lies = list(make_plan(Counts(kills=0, freezes=0, slows=0, disconnects=0, lies=40), seed=5))
    assert {lie_of(fault) for fault in lies} == set(LIES)
    assert all(timetable(fault, patience_s=4.0) == [] and fault.role is None for fault in lies)
    assert describe(lies[0]) == f"a generator joins that lies about {lie_of(lies[0])}"


def test_the_watch_knows_the_longest_time_without_progress(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    watch = RunProgress(folder, 0.0)
    assert watch.poll(3.0) == []
    folder.record(ProcessStarted(process="buffer", pid=1))
    append_row(folder.events, {"event": "waiting", "process": "trainer"})  # no progress
    assert [event["event"] for event in watch.poll(4.0)] == ["started", "waiting"]
    for step in range(3):
        append_row(folder.metrics, {"step": step})
        watch.poll(5.0 + step)
    assert (watch.steps_done, watch.longest_stall_s) == (3, 4.0)
    assert watch.stalled_where == "after the start, before started (buffer)"

    # a resumed run: rows are taken out, what is kept comes again and is no progress
    replace_text(folder.metrics, json.dumps({"step": 0}) + "\n")
    replace_text(folder.events, folder.events.read_text())
    assert watch.poll(12.0) == []
    assert (watch.steps_done, watch.furthest, watch.longest_stall_s) == (1, 3, 5.0)
    append_row(folder.metrics, {"step": 1})
    watch.poll(15.5)
    assert (watch.steps_done, watch.furthest, watch.longest_stall_s) == (2, 3, 8.5)
    assert watch.stalled_where == "after step 2, before step 1"
    assert watch.stalled_s(20.0) == 4.5
