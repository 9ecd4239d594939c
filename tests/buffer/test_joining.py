"""Generators that come and go by themselves, on the state machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from support_buffer import TRAINER, make_core

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.staleness import PacePolicy
from async_rl.version import __version__
from async_rl.wire import messages as msg

PACE = PacePolicy(groups_per_step=2, max_staleness=2, pipeline_depth=3.0, window=1)
WELCOME = msg.Welcome(run="r", settings={}, task_digest="d", host="h", folder="f", segment="s", weights="")
JOIN = msg.Join(name="mine", package=__version__, pid=7)


def told(effects: list[do.Effect], kind: type) -> list[Any]:
    return [e.message for e in effects if isinstance(e, do.Send) and isinstance(e.message, kind)]


def hello(name: str, *, joined: bool = False) -> msg.Hello:
    return msg.Hello(role="generator", name=name, pid=7, joined=joined)


@pytest.fixture
def core() -> Core:
    core = make_core(PACE)
    core.attendance.welcome = WELCOME
    core.handle(b"generator-0", hello("generator-0"), 0.0)
    return core


def test_who_knocks_is_told_the_run(core: Core) -> None:
    assert told(core.handle(b"x", JOIN, 0.0), msg.Welcome) == [WELCOME]
    assert b"x" not in core.admission.generators


@pytest.mark.parametrize(
    ("join", "kind", "reason"),
    [
        ({"name": "generator-0"}, "name", "generator-0 is a name of the launcher's own"),
        ({"name": "generator-7"}, "name", "generator-7 is a name of the launcher's own"),
        ({"name": "trainer"}, "name", "trainer is a name of the launcher's own"),
        ({"name": ""}, "name", "a name has 1 to"),
        ({"name": "x" * 300}, "name", "a name has 1 to"),
        ({"package": "0.0.1"}, "unlike", f"it is async-rl 0.0.1, this run is {__version__}"),
    ],
)
def test_who_cannot_join_is_told_why(core: Core, join: dict[str, Any], kind: str, reason: str) -> None:
    fields = {"name": JOIN.name, "package": JOIN.package, "pid": JOIN.pid}
    effects = core.handle(b"x", msg.Join(**{**fields, **join}), 0.0)
    (refused,) = told(effects, msg.Refused)
    assert refused.kind == kind
    assert refused.reason.startswith(reason)
    assert not told(effects, msg.Welcome)


def test_a_name_is_one_generators_while_it_lives(core: Core) -> None:
    core.handle(b"x/1", hello("mine", joined=True), 0.0)
    for message in (JOIN, hello("mine", joined=True)):
        (refused,) = told(core.handle(b"x/2", message, 1.0), msg.Refused)
        assert "there is a generator of the name mine" in refused.reason
    assert b"x/2" not in core.admission.generators
    assert not told(core.handle(b"x/1", hello("mine", joined=True), 1.0), msg.Refused)  # it comes anew
    core.lost(b"x/1", 2.0)
    assert told(core.handle(b"x/2", JOIN, 3.0), msg.Welcome)
    core.handle(b"x/2", hello("mine", joined=True), 3.0)
    assert b"x/2" in core.admission.generators


def test_nobody_waits_in_vain_for_generators_that_may_be_late() -> None:
    """What the trainer is told counts as progress for `absence_s` after the last one has left."""
    core = make_core(PACE)
    core.admission.rules = replace(core.rules, absence_s=30.0)
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)

    def moves(times: list[float]) -> list[bool]:
        told_of = [told(core.tick(time), msg.Waiting)[0].progress for time in times]
        return [a < b for a, b in itertools.pairwise(told_of)]

    assert moves([5.0, 15.0, 25.0, 34.0]) == [True, True, True]
    assert moves([40.0, 50.0]) == [False]
    core.handle(b"x/1", hello("mine", joined=True), 51.0)
    assert moves([53.0, 56.0]) == [False]  # one is there, and does nothing
    core.lost(b"x/1", 57.0)
    assert moves([59.0, 62.0]) == [True]


def test_a_run_that_starts_no_generator_says_how_one_joins() -> None:
    core = make_core(PACE)
    core.admission.rules = replace(core.rules, how_to_join=": async-rl generate --run runs/x")
    core.handle(TRAINER, msg.NextBatch(step=0), 0.0)
    (waiting,) = told(core.tick(5.0), msg.Waiting)
    assert waiting.reason == "0 of 2 groups finished; no generator is connected: async-rl generate --run runs/x"
