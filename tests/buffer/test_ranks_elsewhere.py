"""Ranks of the trainer on other machines: what their pulses tell the run, and what its end tells them."""

from __future__ import annotations

import pytest
from support_buffer import TRAINER, make_core

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.wire import messages as msg


@pytest.fixture
def core() -> Core:
    return make_core(PacePolicy(groups_per_step=2, max_staleness=1, pipeline_depth=2.0, window=1))


def pulse(name: str = "trainer-rank-3", role: str = msg.RANK, **changes: object) -> msg.Pulse:
    values = {"name": name, "pid": 7, "role": role, "doing": "training step 4", "since_s": 1.0, "host": "node-b"}
    return msg.Pulse(**{**values, **changes})  # type: ignore[arg-type]


def test_a_rank_is_heard_without_a_hello_and_its_silence_shows(core: Core) -> None:
    effects = core.handle(b"trainer-rank-3/pulse", pulse(), 10.0)
    assert effects == [do.Send(peer=b"trainer-rank-3/pulse", message=msg.PulseAnswer())]
    (row,) = [row for row in core.snapshot(14.0).processes if row.role == msg.RANK]
    assert (row.name, row.host, row.pid, row.silent_s) == ("trainer-rank-3", "node-b", 7, 4.0)
    assert core.tick(1000.0) == []  # whoever waits for the trainer judges


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (b"trainer-rank-3/pulse", pulse(role="generator")),
        (b"g/pulse", pulse()),  # another one in its name
        (b"g/pulse", pulse(name="g")),
        (b"trainer-rank-0/pulse", pulse(name="trainer-rank-0")),
        (b"trainer-rank-12345/pulse", pulse(name="trainer-rank-12345")),
    ],
)
def test_what_is_no_rank_is_not_kept(core: Core, peer: bytes, message: msg.Pulse) -> None:
    core.handle(peer, message, 1.0)
    assert [row.name for row in core.snapshot(1.0).processes] == ["trainer"]


def test_those_that_were_started_outside_are_told_of_the_end(core: Core) -> None:
    core.handle(b"trainer-rank-3/pulse", pulse(), 1.0)
    assert core.presence.started_outside() == [b"trainer-rank-3/pulse"]
    core.handle(TRAINER + b"/pulse", pulse(name="trainer", role="trainer"), 1.0)
    assert sorted(core.presence.started_outside()) == [b"trainer-rank-3/pulse", b"trainer/pulse"]
