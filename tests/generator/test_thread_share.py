"""Threads of an engine's step: all while cores are idle, one while others work on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from async_rl.generator import thread_share
from async_rl.generator.thread_share import ThreadShare, Usage, read_usage


@dataclass
class Machine:
    """Two cores. `others`: cores that other processes want; a step of the engine takes 0.1 s."""

    time: float = 0.0
    waited: float = 0.0
    idle: float = 0.0
    others: float = 0.0

    def usage(self) -> Usage:
        return Usage(waited=self.waited, idle=self.idle)

    def pass_(self, seconds: float, threads: int) -> None:
        wanted = threads + self.others
        self.time += seconds
        self.idle += max(0.0, 2 - wanted) * seconds
        self.waited += threads * max(0.0, 1 - 2 / wanted) * seconds if wanted else 0.0

    def step(self, share: ThreadShare) -> int:
        with share:
            self.pass_(0.1, taken := torch.get_num_threads())
        return taken


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Machine()
    torch.set_num_threads(before)


def test_threads_follow_those_who_share_the_cores(machine: Machine) -> None:
    share = ThreadShare(most=2, read=machine.usage, clock=lambda: machine.time)
    assert {machine.step(share) for _ in range(20)} == {2}, "alone"
    machine.others = 2
    taken = [machine.step(share) for _ in range(20)]
    assert taken[0] == 2
    assert set(taken[5:]) == {1}, "beside a trainer that wants both cores"
    assert torch.get_num_threads() == 2, "between steps nothing is different"
    machine.others = 0
    taken = [machine.step(share) for _ in range(40)]
    assert set(taken[20:]) == {2}, "the trainer waits"


def test_one_other_thread_leaves_one(machine: Machine) -> None:
    share = ThreadShare(most=2, read=machine.usage, clock=lambda: machine.time)
    machine.others = 1
    assert {machine.step(share) for _ in range(100)} == {2, 1}
    assert {machine.step(share) for _ in range(100)} == {1}


def test_what_was_tried_in_vain_is_tried_less_and_less_often(machine: Machine) -> None:
    """Others that work in turns: idle at each look, crowded as soon as there are more threads."""
    share = ThreadShare(most=2, read=machine.usage, clock=lambda: machine.time)
    tries = []
    for _ in range(600):
        machine.others = 2 if share.threads == 2 else 0
        tries.append(machine.step(share))
    assert sum(tries[:100]) > sum(tries[-100:]) > 100


def test_an_engine_that_waits_takes_nobodys_idleness_for_room(machine: Machine) -> None:
    share = ThreadShare(most=2, read=machine.usage, clock=lambda: machine.time)
    machine.others = 2
    for _ in range(10):
        machine.step(share)
    machine.others = 1
    for _ in range(50):
        machine.step(share)
        machine.pass_(0.4, 0)  # no sequences: one core is idle
    assert share.threads == 1


def test_a_system_that_does_not_say_leaves_the_threads(machine: Machine) -> None:
    share = ThreadShare(most=2, read=lambda: None, clock=lambda: machine.time)
    machine.others = 2
    assert {machine.step(share) for _ in range(20)} == {2}


def test_what_this_system_says() -> None:
    first = read_usage()
    if first is None:
        pytest.skip("no schedstat here")
    second = read_usage()
    assert second is not None
    assert 0 <= first.waited <= second.waited
    assert 0 < first.idle <= second.idle
    assert thread_share.LOOK_S > 0
