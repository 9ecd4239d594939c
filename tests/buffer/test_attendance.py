"""Generators come, freeze, leave and lose messages: what the buffer makes of it, on a virtual clock."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from support_buffer import TRAINER, answer, make_core

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=4, max_staleness=1, pipeline_depth=1.0, window=1)
LIMIT_S = 15.0


def hello(name: str, session: int = 1, pid: int = 7) -> msg.Hello:
    return msg.Hello(role="generator", name=name, pid=pid, session=session)


def status(session: int = 1, **changes: Any) -> msg.Status:
    standing = msg.Status(
        name="", session=session, version=0, busy_seconds=0, wall_seconds=0, tokens_generated=0, running=0, waiting=0
    )
    return replace(standing, **changes)


def pulse(name: str, doing: str = "decoding 14 sequences", since_s: float = 2.0) -> msg.Pulse:
    return msg.Pulse(name=name, pid=7, role="generator", doing=doing, since_s=since_s)


def told(effects: list[do.Effect], peer: bytes, kind: type) -> list[Any]:
    sent = [e for e in effects if isinstance(e, do.Send) and e.peer == peer]
    return [e.message for e in sent if isinstance(e.message, kind)]


def permits(effects: list[do.Effect], peer: bytes) -> list[int]:
    return [permit.group for message in told(effects, peer, msg.Permits) for permit in message.permits]


def notes(effects: list[do.Effect]) -> list[tuple[str, Any]]:
    return [(e.event.event, e.event.detail()) for e in effects if isinstance(e, do.Note)]


def pass_time(core: Core, since: float, until: float) -> list[do.Effect]:
    """The buffer ticks twice a second."""
    out: list[do.Effect] = []
    for half in range(int(2 * since) + 1, int(2 * until) + 1):
        out += core.tick(half / 2)
    return out


@pytest.fixture
def core() -> Core:
    """`a` holds all four groups, `b` has room for four more."""
    core = make_core(PACE, frozen_after_s=LIMIT_S, stall_report_s=1e6)
    core.tick(0.0)
    core.handle(b"a", hello("a"), 0.0)
    assert permits(core.handle(b"a", msg.Want(limit=4, version=0, session=1), 0.0), b"a") == [0, 1, 2, 3]
    core.handle(b"b", hello("b"), 0.0)
    assert core.handle(b"b", msg.Want(limit=4, version=0, session=1), 0.0) == []
    return core


def test_the_permits_of_a_frozen_generator_go_to_others_at_no_new_charge(core: Core) -> None:
    core.handle(b"a/pulse", pulse("a"), 3.0)
    core.handle(b"b", status(limit=4), 10.0)
    assert notes(pass_time(core, 0, 17.5)) == []
    effects = pass_time(core, 17.5, 18.5)
    ((event, detail),) = notes(effects)
    assert event == "generator_lost"
    assert detail["name"] == "a"
    assert detail["groups"] == (0, 1, 2, 3)
    assert detail["silent_s"] == 15.5
    assert detail["reason"] == "last heard of a 15.5 s ago: decoding 14 sequences (for 17.5 s)"
    assert permits(effects, b"b") == [0, 1, 2, 3]
    assert core.counts["groups_admitted"] == 4
    assert core.counts["generators_frozen"] == 1


def test_a_generator_whose_pulse_goes_on_is_not_frozen_however_long_it_is_busy(core: Core) -> None:
    for second in range(1, 100):
        assert notes(pass_time(core, second - 1, second)) == [] or second > 10
        core.handle(b"a/pulse", pulse("a", since_s=float(second)), float(second))
        core.handle(b"b", status(limit=4), float(second))
    assert b"a" in core.admission.generators
    assert core.counts["generators_frozen"] == 0


def test_all_frozen_generators_are_given_up_before_what_they_held_is_given(core: Core) -> None:
    effects = pass_time(core, 0, 16)
    assert [event for event, _ in notes(effects) if event == "generator_lost"] == ["generator_lost"] * 2
    assert told(effects, b"b", msg.Permits) == []
    core.handle(b"c", hello("c"), 17.0)
    assert permits(core.handle(b"c", msg.Want(limit=4, version=0, session=1), 17.0), b"c") == [0, 1, 2, 3]


def test_a_buffer_that_was_away_itself_gives_everybody_their_time_anew(core: Core) -> None:
    pass_time(core, 0, 5)
    assert notes(core.tick(300.0)) == [], "it has heard nobody for five minutes: it was stopped"
    assert notes([e for e in pass_time(core, 300, 314) if "lost" in str(e)]) == []
    assert "generator_lost" in [event for event, _ in notes(pass_time(core, 314, 316))]


def test_one_that_wakes_is_told_that_it_is_unknown_and_begins_anew_with_nothing_in_hand(core: Core) -> None:
    old = answer(core.groups[2].permit_missing(), 0, 0)
    core.handle(b"b", status(limit=4), 10.0)
    effects = pass_time(core, 0, 20)
    (given,) = told(effects, b"b", msg.Permits)
    assert (given.session, given.granted) == (1, 4)
    for message in (status(groups=(0, 1, 2, 3)), msg.Want(limit=9, version=0, session=1)):
        assert told(core.handle(b"a", message, 21.0), b"a", msg.Unknown) == [msg.Unknown(session=1)]
    # what it had finished counts all the same
    assert told(core.handle(b"a", msg.Finished(trajectories=(old,)), 21.0), b"a", msg.Accepted)
    assert core.groups[2].missing == (1,)
    core.handle(b"a", hello("a", session=2), 22.0)
    assert told(core.handle(b"a", status(session=1), 22.0), b"a", msg.Unknown), "an old word of its old life"
    assert told(core.handle(b"a", status(session=2, limit=4), 22.0), b"a", msg.Unknown) == []
    assert core.admission.generators[b"a"].limit == 4
    assert core.admission.generators[b"a"].groups == {}


def test_saying_hello_again_changes_nothing_and_a_new_life_gives_back_what_the_old_one_held(core: Core) -> None:
    effects = core.handle(b"a", hello("a"), 1.0)
    assert told(effects, b"a", msg.NewWeights)
    assert sorted(core.admission.generators[b"a"].groups) == [0, 1, 2, 3]
    assert permits(core.handle(b"a", hello("a", session=2), 2.0), b"b") == [0, 1, 2, 3]


def test_a_permit_that_did_not_arrive_is_sent_again_and_one_in_hand_is_not(core: Core) -> None:
    early = core.handle(b"a", status(limit=4, groups=()), 2.0)
    assert permits(early, b"a") == [], "it may still be on its way"
    later = core.handle(b"a", status(limit=4, groups=(0, 2)), 4.0)
    assert permits(later, b"a") == [1, 3]
    assert told(later, b"a", msg.Permits)[0].granted == 4, "a total: it asks for nothing more"
    assert permits(core.handle(b"a", status(limit=4, groups=(0, 2)), 5.0), b"a") == []
    assert permits(core.handle(b"a", status(limit=4, groups=(0, 2)), 8.0), b"a") == [1, 3]
    assert core.counts["groups_admitted"] == 4


def test_new_weights_are_announced_again_to_one_that_stays_behind(core: Core) -> None:
    for group in range(4):
        done = tuple(answer(core.groups[group].permit_missing(), sample, 0) for sample in (0, 1))
        core.handle(b"a", msg.Finished(trajectories=done), 1.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 1.0)
    core.handle(TRAINER, msg.Published(version=1), 2.0)
    assert told(core.handle(b"a", status(), 4.0), b"a", msg.NewWeights) == []
    assert told(core.handle(b"a", status(), 5.5), b"a", msg.NewWeights) == [msg.NewWeights(version=1)]
    assert told(core.handle(b"a", status(), 6.0), b"a", msg.NewWeights) == []
    assert told(core.handle(b"a", status(version=1), 9.0), b"a", msg.NewWeights) == []
    assert core.admission.generators[b"a"].version == 1, "its Holds may have got lost"


def test_who_leaves_gives_its_permits_back_at_once(core: Core) -> None:
    effects = core.handle(b"a", msg.Leave(name="a", reason="told to end", session=1), 1.0)
    assert notes(effects) == [("generator_left", {"name": "a", "groups": (0, 1, 2, 3), "reason": "told to end"})]
    assert permits(effects, b"b") == [0, 1, 2, 3]


def test_the_launchers_word_of_a_death_is_about_that_life_only(core: Core) -> None:
    assert core.handle(b"launcher", msg.Gone(name="a", pid=6, reason="killed"), 1.0) == []
    effects = core.handle(b"launcher", msg.Gone(name="a", pid=7, reason="killed"), 1.0)
    assert permits(effects, b"b") == [0, 1, 2, 3]
    assert core.handle(b"launcher", msg.Gone(name="a", pid=7, reason="killed"), 1.0) == []


def test_a_pulse_is_answered_so_that_the_buffer_is_known_to_live(core: Core) -> None:
    assert told(core.handle(b"a/pulse", pulse("a"), 1.0), b"a/pulse", msg.PulseAnswer) == [msg.PulseAnswer()]


def test_a_step_counts_as_trained_when_only_a_later_version_is_heard_of(core: Core) -> None:
    core = make_core(PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=2.0, window=1), group_size=1)
    core.handle(b"a", hello("a"), 0.0)
    core.handle(b"a", msg.Want(limit=9, version=0, session=1), 0.0)
    for step in range(2):
        core.handle(b"a", msg.Finished(trajectories=(answer(core.groups[step].permit_missing(), 0, 0),)), 0.0)
        core.handle(TRAINER, msg.NextBatch(step=step), 0.0)
    effects = core.handle(TRAINER, msg.Published(version=2), 1.0)
    assert [e.step for e in effects if isinstance(e, do.MarkTrained)] == [0, 1]


def joined(core: Core, number: int, *, group_runs: bool, doing: str = "in tasks or rewards of 1 episodes") -> list[Any]:
    """A guest joins, is given a group, and is heard no more; what the buffer notes."""
    name, at = f"guest-{number}", 100.0 * number
    peer = name.encode()
    core.tick(at)
    core.handle(peer, replace(hello(name, session=number, pid=number), joined=True), at)
    (permit, *_) = permits(core.handle(peer, msg.Want(limit=1, version=0, session=number), at), peer)
    beat = msg.Pulse(
        name=name, pid=number, role="generator", doing=doing, since_s=1.0, group=permit if group_runs else -1
    )
    core.handle(peer + b"/pulse", beat, at + 1)
    return notes(pass_time(core, at + 1, at + 2 + LIMIT_S))


@pytest.mark.parametrize(
    ("doing", "place"),
    [
        ("in tasks or rewards of 1 episodes", "unknown place on a joined generator"),
        ("in tasks; held up for 3.2 s in my_rewards.py:31 judge", "my_rewards.py:31 judge"),
    ],
)
def test_a_group_whose_code_ran_when_two_guests_fell_silent_is_refused(doing: str, place: str) -> None:
    core = make_core(PACE, frozen_after_s=LIMIT_S, stall_report_s=1e6)
    joined(core, 1, group_runs=True, doing=doing)
    found = dict(joined(core, 2, group_runs=True, doing=doing))
    assert "ended its generator 2 times, in " + place in str(found["problem_refused"])


def test_silence_without_a_tasks_code_and_guests_that_come_back_count_against_nobody() -> None:
    core = make_core(PACE, frozen_after_s=LIMIT_S, stall_report_s=1e6)
    for number in range(1, 5):
        assert "problem_refused" not in dict(joined(core, number, group_runs=False))
    for number in range(5, 9):
        assert "problem_refused" not in dict(joined(core, number, group_runs=True))
        back = replace(hello(f"guest-{number}", session=100 + number, pid=number), joined=True)
        core.handle(f"guest-{number}".encode(), back, 100.0 * number + 50)


def test_a_keeper_speaks_of_its_own_generator_alone() -> None:
    core = make_core(PACE, frozen_after_s=LIMIT_S, stall_report_s=1e6)
    refused: list[Any] = []
    for number in (1, 2):
        name = f"guest-{number}"
        core.handle(name.encode(), replace(hello(name, session=number, pid=number), joined=True), 1.0)
        got = permits(core.handle(name.encode(), msg.Want(limit=1, version=0, session=number), 1.0), name.encode())
        told = msg.Gone(name=name, pid=number, reason=f"{name} crashed", groups=tuple(got), place="r.py:3 judge")
        for stranger in (b"guest-9/keeper", b"guest-1"):
            answers = core.handle(stranger, told, 1.0)
            assert not any(isinstance(effect, do.Note) for effect in answers)
        refused += notes(core.handle(name.encode() + b"/keeper", told, 1.0))
        assert name.encode() not in core.admission.generators
    assert "ended its generator 2 times, in r.py:3 judge; the last time: guest-2 crashed" in str(dict(refused))


def test_of_several_in_threads_each_counts_for_its_share() -> None:
    core = make_core(PACE, frozen_after_s=LIMIT_S, stall_report_s=1e6)
    core.handle(b"generator-0", hello("generator-0"), 0.0)
    got = permits(core.handle(b"generator-0", msg.Want(limit=2, version=0, session=1), 0.0), b"generator-0")
    for pid in range(1, 5):
        end = msg.Gone(name="generator-0", pid=100 + pid, reason="ended with code 7", groups=tuple(got))
        found = notes(core.handle(b"launcher", end, 1.0))
        assert len(found) == (2 if pid == 4 else 0)
