"""How much a turn tells about the right answer: what it does to the policy's own probability of it (IGPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from async_rl.task.protocol import Session


@dataclass(slots=True)
class InformationGain:
    """Rewards turns with p after minus p before; p: exp of the mean log-prob of the answer behind the context.

    Example, in `Task.rollout`:
        gain = InformationGain(session, f" The answer is {answer}.")
        await gain.begin()
        while not done:
            ...generate, append what the environment says...
            await gain.reward_turn()   # of every turn but the last, which has the outcome

    Each call is one forward over the context (`Session.score`), by the weights that the generator has then.
    """

    session: Session
    answer: str
    """in the words in which the policy would give it, e.g. with a fixed beginning"""
    before: float = 0.0
    """probability before the turn that is rewarded next"""

    async def begin(self) -> None:
        """Measure before the first turn."""
        self.before = await self.probability()

    async def reward_turn(self) -> float:
        """Reward the turn generated last with what it, and what the environment said to it, did to the probability."""
        now = await self.probability()
        gain, self.before = now - self.before, now
        self.session.reward_turn(gain)
        return gain

    async def probability(self) -> float:
        """Of the answer here, the geometric mean over its tokens; 0 where the context has no room for it."""
        try:
            score = await self.session.score(self.answer)
        except ValueError:  # the context is full
            return 0.0
        return math.exp(score.total / len(score.log_probs)) if score.log_probs else 0.0
