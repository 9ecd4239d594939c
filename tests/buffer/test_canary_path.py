"""The buffer passes evidence on to the trainer, and whose it is."""

from __future__ import annotations

import pytest

from async_rl.buffer import effects as do
from async_rl.buffer.core import Core
from async_rl.buffer.depth import Rules
from async_rl.buffer.staleness import PacePolicy
from async_rl.wire import messages as msg

TRAINER, GENERATOR = b"trainer", b"generator-0"
SHOWN = msg.Canary(name="generator-0", version=3, digests=(("w", 2**64 - 1),), log_probs=(-0.5,))


@pytest.fixture
def core() -> Core:
    rules = Rules(
        policy=PacePolicy(groups_per_step=1, max_staleness=1, pipeline_depth=1, window=1),
        group_size=1,
        temperature=1.0,
        drop_zero_signal=False,
        max_failures=1,
        max_refusals=1,
        seed=0,
    )
    core = Core(rules, problem_at=lambda position: position)
    core.ledger.step = 5  # so many versions of weights may exist
    return core


def hello(core: Core, peer: bytes, role: str) -> None:
    core.handle(peer, msg.Hello(role=role, name=peer.decode(), pid=1), 0.0)


def sends(effects: list[do.Effect]) -> list[tuple[bytes, msg.Message]]:
    return [(e.peer, e.message) for e in effects if isinstance(e, do.Send)]


def test_evidence_goes_to_the_trainer_under_the_name_the_buffer_knows(core: Core) -> None:
    hello(core, TRAINER, "trainer")
    hello(core, GENERATOR, "generator")
    forged = msg.Canary(name="somebody else", version=3, digests=SHOWN.digests, log_probs=SHOWN.log_probs)
    assert sends(core.handle(GENERATOR, forged, 1.0)) == [(TRAINER, SHOWN)]


def test_a_second_trainer_is_refused_and_gets_nothing(core: Core) -> None:
    hello(core, TRAINER, "trainer")
    hello(core, GENERATOR, "generator")
    hello(core, b"another", "trainer")
    hello(core, TRAINER, "trainer")
    assert core.refusals.counts == {"second": 1}
    assert sends(core.handle(GENERATOR, SHOWN, 1.0)) == [(TRAINER, SHOWN)]


@pytest.mark.parametrize("known", ["trainer", "generator"])
def test_without_a_trainer_or_of_a_stranger_it_is_counted_and_let_go(core: Core, known: str) -> None:
    hello(core, TRAINER if known == "trainer" else GENERATOR, known)
    assert [peer for peer, _ in sends(core.handle(GENERATOR, SHOWN, 1.0)) if peer == TRAINER] == []
    assert core.counts["canaries_ignored"] + core.refusals.counts["stranger"] == 1


def test_a_batch_names_the_connected_generators_and_what_they_hold(core: Core) -> None:
    hello(core, GENERATOR, "generator")
    core.handle(GENERATOR, msg.Holds(version=5), 1.0)
    assert core.snapshot(1.0).counters.held_versions["generator-0"] == 5
