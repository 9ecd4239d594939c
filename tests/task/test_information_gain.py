"""Turns are rewarded with what they did to the policy's probability of the right answer."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from async_rl.task.information_gain import InformationGain
from async_rl.task.protocol import Score


@dataclass
class Scored:
    """A session whose probabilities of the answer are given, one after another."""

    probabilities: list[float]
    rewards: list[float] = field(default_factory=list)

    async def score(self, text: str) -> Score:
        if not self.probabilities:
            raise ValueError("the context is full")
        p = self.probabilities.pop(0)
        return Score(log_probs=(math.log(p) - 0.5, math.log(p) + 0.5), version=3)

    def reward_turn(self, value: float, *, agent: str | None = None) -> None:
        self.rewards.append(value)


def test_the_published_vector_and_a_context_that_is_full() -> None:
    session = Scored([0.10, 0.25, 0.20])

    async def play() -> None:
        gain = InformationGain(session, " 7")  # type: ignore[arg-type]
        await gain.begin()
        for _ in range(3):
            await gain.reward_turn()

    asyncio.run(play())
    assert session.rewards == pytest.approx([0.15, -0.05, -0.20])
