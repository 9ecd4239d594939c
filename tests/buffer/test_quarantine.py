"""What the buffer sends to be verified, and what becomes of a generator that was proven to lie."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as altered
from support_buffer import TRAINER, answer, make_core, trajectory

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.loop import write
from async_rl.buffer.restore import read_state, restore
from async_rl.buffer.staleness import PacePolicy
from async_rl.buffer.store import Store
from async_rl.buffer.verification import MOST_GROUPS, NEW, Sampling
from async_rl.events import GeneratorQuarantined
from async_rl.trajectory import Trajectory, VersionSpan
from async_rl.version import __version__
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1)
LIE = msg.Verdict(name="mallory", session=1, lie="tokens", reason="not those of its seed", proven=True)


def told(effects: list[do.Effect], kind: type) -> list[Any]:
    return [e.message for e in effects if isinstance(e, do.Send) and isinstance(e.message, kind)]


class Play:
    """A core, with what its generators hold."""

    def __init__(self, **changes: Any) -> None:
        self.core: Core = make_core(PACE, verify_share=1.0, secret=b"s", **changes)
        self.permits: dict[bytes, list[msg.Permit]] = {}
        self.effects: list[do.Effect] = []
        self.verified: list[msg.Verify] = []

    def say(self, peer: bytes, message: msg.Message) -> list[do.Effect]:
        found = self.core.handle(peer, message, 0.0)
        self.effects += found
        self.verified += told(found, msg.Verify)
        for effect in found:
            if isinstance(effect, do.Send) and isinstance(effect.message, msg.Permits):
                self.permits.setdefault(effect.peer, []).extend(effect.message.permits)
        return found

    def hello(self, name: str, *, pid: int = 5, session: int = 1, joined: bool = False) -> list[do.Effect]:
        peer = name.encode()
        found = self.say(peer, msg.Hello(role="generator", name=name, pid=pid, session=session, joined=joined))
        if peer in self.core.admission.generators:
            found = [*found, *self.say(peer, msg.Want(limit=2, version=0, session=session))]
        return found

    def finish(self, peer: bytes, permit: msg.Permit, samples: tuple[int, ...] = (0, 1)) -> list[do.Effect]:
        made = tuple(answer(permit, sample, 0) for sample in samples)
        return self.say(peer, msg.Finished(trajectories=made))


def test_a_hundredth_is_verified_and_more_of_a_new_generator_and_some_of_every_twenty_groups() -> None:
    for group_size in (4, 8):
        sampling = Sampling(share=0.01, group_size=group_size, secret=b"secret")
        one = trajectory(0, 0, 0)
        chosen = [n for n in range(20_000) if sampling.choose(("g", 1), one)]
        assert chosen[:NEW] == list(range(NEW))  # all of its first
        assert 25 < sum(n < 400 for n in chosen) < 60
        longest = min(100, MOST_GROUPS * group_size)
        gaps = [b - a for a, b in pairwise(chosen)]
        assert max(gaps) < 2 * longest <= 50 * group_size
        later = sum(n >= 10_000 for n in chosen) / 10_000
        assert later == pytest.approx(1 / longest, rel=0.02)
    others = Sampling(share=0.01, group_size=8, secret=b"another")
    assert [n for n in range(20_000) if others.choose(("g", 1), one)] != chosen
    assert not any(Sampling(share=0.0, group_size=8, secret=b"").choose(("g", 1), one) for _ in range(100))


def test_what_arrives_is_sent_to_the_trainer_under_the_name_that_the_buffer_knows() -> None:
    play = Play()
    play.hello("mallory")
    permit = play.permits[b"mallory"][0]
    made = tuple(altered(answer(permit, sample, 0), generator="alice") for sample in (0, 1))
    found = play.say(b"mallory", msg.Finished(trajectories=made))
    (sent,) = play.verified
    assert (sent.name, sent.session, len(sent.trajectories)) == ("mallory", 1, 2)
    (added,) = [e for e in found if isinstance(e, do.AddTrajectories)]
    assert {t.generator for t in added.trajectories} == {"mallory"}


def test_what_another_began_is_no_evidence() -> None:
    play = Play()
    play.hello("alice")
    permit = play.permits[b"alice"][0]
    play.say(b"alice", msg.Turns(trajectories=(altered(answer(permit, 0, 0), ended="aborted", reason="runs"),)))
    play.core.lost(b"alice", 0.0)
    play.hello("bob")
    assert permit.group in [p.group for p in play.permits[b"bob"]]
    play.finish(b"bob", permit)
    assert not play.verified


def test_under_suspicion_all_is_verified() -> None:
    play = Play()
    play.core.trust.sampling.share = 1e-6
    play.core.trust.sampling.stretches[("mallory", 1), "train"] = (10**6, -1, 2 * 10**6)
    play.hello("mallory")
    first, second = play.permits[b"mallory"][:2]
    play.finish(b"mallory", first)
    assert not play.verified
    play.say(TRAINER, altered(LIE, proven=False))
    play.finish(b"mallory", second)
    assert [len(sent.trajectories) for sent in play.verified] == [2]


def test_a_proven_liar_loses_its_permits_and_what_is_not_trained_is_asked_again() -> None:
    play = Play()
    play.hello("mallory", joined=True)
    play.hello("alice", joined=True)
    done, half = play.permits[b"mallory"][:2]
    play.finish(b"mallory", done)
    play.finish(b"mallory", half, (0,))
    found = play.say(TRAINER, LIE)
    refused = {e.group: e.reason for e in found if isinstance(e, do.RefuseGroup)}
    assert refused == dict.fromkeys((done.group, half.group), "fabricated: by mallory (tokens)")
    (event,) = [e.event for e in found if isinstance(e, do.Note)]
    assert isinstance(event, GeneratorQuarantined)
    assert (event.name, event.pid, event.lie, event.groups_refused, event.groups_trained) == (
        "mallory",
        5,
        "tokens",
        2,
        0,
    )
    (said,) = told(found, msg.Refused)
    assert said.kind == "quarantine"
    assert "mallory reported tokens that are not what it did: not those of its seed" in said.reason
    assert b"mallory" not in play.core.admission.generators
    assert [(g.position, g.attempt) for g in play.core.groups.values() if g.attempt] == []
    for number in range(4):  # alice gets everything, the two problems first
        play.say(b"alice", msg.Want(limit=4 + number, version=0, session=1))
    again = [g for g in play.core.groups.values() if g.attempt == 1]
    assert {g.problem for g in again} == {done.problem, half.problem}
    assert not play.say(TRAINER, LIE)  # said again it changes nothing

    for message in (
        msg.Want(limit=9, version=0, session=1),
        msg.Finished(trajectories=(answer(half, 1, 0),)),
        msg.Turns(trajectories=(answer(half, 1, 0),)),
        msg.Hello(role="generator", name="mallory", pid=5, session=2),
        msg.Hello(role="generator", name="mallory", pid=6, session=3, joined=True),
        msg.Join(name="mallory", package=__version__, pid=6),
    ):
        found = play.say(b"mallory", message)
        assert [m.kind for m in told(found, msg.Refused)] == ["quarantine"], message
        assert not [e for e in found if isinstance(e, do.AddTrajectories | do.SaveTurns)]


def test_a_generator_of_the_launchers_may_come_back_once_as_a_new_process() -> None:
    play = Play()
    lie = altered(LIE, name="generator-0")
    play.hello("generator-0", pid=5)
    play.say(TRAINER, lie)
    assert told(play.hello("generator-0", pid=5, session=2), msg.Refused)  # the same process
    assert not told(play.hello("generator-0", pid=6, session=3), msg.Refused)
    assert play.core.trust.barred(b"generator-0", msg.Want(limit=1, version=0, session=3)) == ""
    play.say(TRAINER, altered(lie, session=3))
    assert told(play.hello("generator-0", pid=7, session=4), msg.Refused)


def test_a_liars_last_words_are_no_charge_against_the_next_process_of_its_name() -> None:
    play = Play()
    play.hello("generator-0", pid=5, session=1)
    first, second = play.permits[b"generator-0"]
    play.say(TRAINER, altered(LIE, name="generator-0"))
    found = play.say(b"generator-0", msg.Finished(trajectories=(answer(first, 0, 0),), session=1))
    assert [(m.kind, m.session) for m in told(found, msg.Refused)] == [("quarantine", 1)]  # it may have ended

    # its Hello was lost: it is unknown, not kept out
    found = play.say(b"generator-0", msg.Want(limit=2, version=0, session=2))
    assert [(m.kind, m.session) for m in told(found, msg.Refused)] == [("stranger", 2)]
    assert [m.session for m in told(found, msg.Unknown)] == [2]

    play.hello("generator-0", pid=6, session=2)
    asked_again = play.permits[b"generator-0"][2]
    play.finish(b"generator-0", asked_again, (0,))
    assert [sent.session for sent in play.verified] == [2]
    late: msg.Message
    for late in (
        msg.Finished(trajectories=(answer(second, 1, 0),), session=1),
        msg.Turns(trajectories=(answer(second, 1, 0),), session=1),
        msg.Want(limit=5, version=0, session=1),
    ):
        found = play.say(b"generator-0", late)
        assert [(m.kind, m.session) for m in told(found, msg.Refused)] == [("quarantine", 1)], late
        assert not [e for e in found if isinstance(e, do.AddTrajectories | do.SaveTurns)]
    assert play.core.admission.generators[b"generator-0"].session == 2


def test_what_an_earlier_process_sent_is_verified_as_its_own() -> None:
    play = Play()
    play.core.trust.sampling.share = 1e-6
    play.hello("generator-0", pid=5, session=1)
    (first, _) = play.permits[b"generator-0"]
    play.hello("generator-0", pid=6, session=2)
    assert not told(play.say(b"generator-0", msg.Finished(trajectories=(answer(first, 0, 0),), session=1)), msg.Refused)
    assert [(sent.session, len(sent.trajectories)) for sent in play.verified] == [(1, 1)]
    found = play.say(TRAINER, altered(LIE, name="generator-0", session=1))
    assert [e.group for e in found if isinstance(e, do.RefuseGroup)] == [first.group]
    assert not told(found, msg.Refused)
    assert play.core.admission.generators[b"generator-0"].session == 2
    found = play.say(TRAINER, altered(LIE, name="generator-0", session=2))
    assert [m.session for m in told(found, msg.Refused)] == [2]


def test_a_number_of_its_own_invention_frees_no_liar() -> None:
    play = Play()
    play.hello("generator-0", pid=5, session=1)
    permit = play.permits[b"generator-0"][0]
    play.say(TRAINER, altered(LIE, name="generator-0"))
    found = play.say(b"generator-0", msg.Finished(trajectories=(answer(permit, 0, 0),), session=77))
    assert [m.kind for m in told(found, msg.Refused)] == ["quarantine"]

    play = Play()
    play.hello("generator-0", pid=5, session=1)
    for made_up, permit in zip((78, 79), play.permits[b"generator-0"], strict=True):
        play.say(b"generator-0", msg.Finished(trajectories=(answer(permit, 0, 0),), session=made_up))
        assert play.verified[-1].session == made_up
        found = play.say(TRAINER, altered(LIE, name="generator-0", session=made_up))
    assert [m.session for m in told(found, msg.Refused)] == [1]  # the name stays out now, and so does this process
    assert b"generator-0" not in play.core.admission.generators
    assert told(play.hello("generator-0", pid=9, session=2), msg.Refused)


def test_messages_with_impossible_versions_prove_a_lie() -> None:
    play = Play()
    play.hello("mallory")
    permit = play.permits[b"mallory"][0]
    future: Trajectory = answer(permit, 0, 9, versions=(VersionSpan(version=9, start=1, end=2),))
    for number in range(3):
        assert b"mallory" in play.core.admission.generators, number
        found = play.say(b"mallory", msg.Finished(trajectories=(future,)))
    (event,) = [e.event for e in found if isinstance(e, do.Note)]
    assert isinstance(event, GeneratorQuarantined)
    assert event.lie == "versions"


def test_trained_groups_are_counted_and_a_restarted_buffer_knows_the_liar(tmp_path: Path) -> None:
    play = Play()
    play.hello("mallory")
    for permit in list(play.permits[b"mallory"]):
        play.finish(b"mallory", permit)
    play.say(TRAINER, msg.NextBatch(step=0))
    play.say(TRAINER, msg.Published(version=1))
    play.say(b"mallory", msg.Want(limit=3, version=0, session=1))
    waiting = play.permits[b"mallory"][-1]
    play.finish(b"mallory", waiting)
    found = play.say(TRAINER, LIE)
    (event,) = [e.event for e in found if isinstance(e, do.Note)]
    assert isinstance(event, GeneratorQuarantined)
    assert (event.groups_trained, event.first_step, event.last_step) == (2, 0, 0)

    with Store(tmp_path / "s.sqlite", durability="process", create=True) as store:
        for effect in play.effects:
            write(effect, store)
        store.commit()
        fresh = make_core(PACE, verify_share=1.0)
        restore(fresh, read_state(store), version=1)
    assert fresh.trust.quarantine.keeps_out("mallory", 99)
    position = next(e.position for e in play.effects if isinstance(e, do.AddGroup) and e.group == waiting.group)
    assert (position, 1) in fresh.admission.refill
