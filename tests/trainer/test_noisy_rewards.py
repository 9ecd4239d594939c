"""A reward that is no pure function is told from a lie: it ends the comparison, and no generator is blamed for it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from support_buffer import trajectory

from async_rl.events import Event, RewardsNotRepeatable, TrajectoryDoubted
from async_rl.trainer.replays import Replays
from async_rl.trainer.verifier import Verifier, VerifyOptions
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import unpack
from async_rl.wire import messages as msg

EPISODES = 300
SETTLED_S = 60.0
Reward = Callable[["Process", int], float]


@dataclass
class Process:
    """One in which the reward is called: a generator, or a child that keeps the contract of generator/replay.py."""

    random: Random
    reward: Reward
    own: float = field(init=False)
    """differs between processes, as the hash of a text does"""
    calls: dict[int, int] = field(default_factory=dict)
    process: Any = None

    def __post_init__(self) -> None:
        self.own = self.random.random()

    def start(self) -> bool:
        return True

    def stop(self) -> None:
        pass

    def ask(self, question: Mapping[str, str], *, within_s: float) -> Mapping[str, object]:
        one = unpack(base64.b64decode(question["trajectory"]))
        earned = self.reward(self, one.group)
        told = f"its reward is {one.reward:g}, played again it earns {earned:g}"
        wrong = earned != one.reward
        return {"lie": "rewards" if wrong else "", "reason": told if wrong else "", "played": True}


def pure(_: Process, group: int) -> float:
    return float(group % 3)


def coin(process: Process, _: int) -> float:
    return float(process.random.random() < 0.5)


def one_in_twenty(process: Process, group: int) -> float:
    return float(group % 2 ^ (process.random.random() < 0.05))


def of_the_process(process: Process, group: int) -> float:
    return float(Random(f"{process.own} {group}").random() < 0.5)


def only_once(process: Process, group: int) -> float:
    """Full for the first answer of a kind: a process that sees fewer gives it more often."""
    process.calls[group % 30] = process.calls.get(group % 30, 0) + 1
    return float(process.calls[group % 30] == 1)


class Checked:
    """A verifier, to which episodes come as if it had scored them."""

    def __init__(self, reward: Reward, seed: int) -> None:
        random = Random(seed)
        self.events: list[Event] = []
        self.verdicts: list[msg.Message] = []
        self.generator = Process(random, reward)
        replays = Replays("")
        replays.children = (Process(random, reward), Process(random, reward))  # type: ignore[assignment]
        self.verifier = Verifier(
            learner=SimpleNamespace(version=0),  # type: ignore[arg-type]
            held=SimpleNamespace(),  # type: ignore[arg-type]
            options=VerifyOptions(dtype="float32", tolerance=0.02, seeded=True, mixes=False, most_tokens=100),
            send=self.verdicts.append,
            record=self.events.append,
            replays=replays,
            start_s=0.0,
        )

    def play(self, lie: float = 0.0, life: int = 1) -> int:
        """Episodes until somebody is proven to lie or the comparison ends; all of them, if neither happens."""
        for number in range(EPISODES):
            if self.proven or self.verifier.replays.over:
                return number
            earned = self.generator.reward(self.generator, number)
            if number >= 8 and Random(number).random() > 0.3:
                continue  # not chosen
            told = replace(trajectory(number, 0, 0), reward=earned + lie, problem=number // 4)
            self.settle(told, life)
        return EPISODES

    def settle(self, told: Trajectory, life: int) -> None:
        assert self.verifier.replays.ask(("g", life), told)
        until = time.monotonic() + SETTLED_S
        while self.verifier.replays.pending and time.monotonic() < until:
            self.verifier.work()
            time.sleep(0.0005)

    @property
    def proven(self) -> bool:
        return any(isinstance(one, msg.Verdict) and one.proven for one in self.verdicts)


@contextmanager
def checked(reward: Reward, seed: int) -> Iterator[Checked]:
    one = Checked(reward, seed)
    try:
        yield one
    finally:
        one.verifier.close()


@pytest.mark.parametrize("reward", [coin, one_in_twenty, of_the_process, only_once])
def test_no_generator_is_blamed_for_a_reward_that_varies(reward: Reward) -> None:
    for seed in range(30):
        with checked(reward, seed) as one:
            one.play()
            assert not one.proven, seed
            assert one.verifier.replays.over
            (said,) = (event for event in one.events if isinstance(event, RewardsNotRepeatable))
            assert "played again twice: " in said.reason
            assert " and then: " in said.reason


def test_a_lie_is_still_proven_within_a_few_groups() -> None:
    with checked(pure, 0) as one:
        assert one.play(lie=1.0) <= 60
        assert one.proven
        (doubt,) = (event for event in one.events if isinstance(event, TrajectoryDoubted))
        assert doubt.reason == "its reward is 1, played again it earns 0"


def test_a_generator_that_comes_again_and_lies_about_the_same_problems_is_found_again() -> None:
    with checked(pure, 0) as one:
        one.play(lie=1.0)
        one.verdicts.clear()
        assert one.play(lie=1.0, life=2) <= 60
        assert one.proven
