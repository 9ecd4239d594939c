"""An episode that nobody wants any more ends at once and shows what was generated of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from support_models import make_decoder, qwen3_config, write_folder

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Problem, Session, Split
from async_rl.trajectory import Trajectory
from async_rl.wire.messages import ABANDONED, Permit

PERMIT = Permit(group=4, problem=0, split="train", samples=(1,), seed=0, temperature=1.0)
TICKET = Ticket(permit=PERMIT, sample=1, seed=7)
LONGEST = 10_000
"""tokens, more than the engine's context holds"""


@dataclass
class TwoTurns:
    """A short turn, then one without end."""

    name: str = "two turns"
    first: int = 3

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc")]

    async def rollout(self, problem: Problem, session: Session) -> float:
        await session.generate(max_tokens=self.first)
        session.append("b")
        await session.generate(max_tokens=LONGEST)
        return 1.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


def play(tokenizer: Tokenizer, *, after: int) -> tuple[Trajectory, EmbeddedEngine]:
    """Abandoned when the engine has sampled so many tokens."""

    async def run() -> tuple[Trajectory, EmbeddedEngine]:
        engine = EmbeddedEngine(make_decoder(qwen3_config(), 0), tokenizer, max_sequences=4)
        session = EpisodeSession(
            engine=engine, tokenizer=tokenizer, ticket=TICKET, session_id=1, max_context=engine.max_context, max_turns=9
        )
        episode = asyncio.create_task(run_episode(TwoTurns(), session, TICKET, timeout_s=60.0))
        while engine.stats().tokens_generated < after:
            await asyncio.sleep(0)
        session.abandon(ABANDONED)
        made = await episode
        await engine.close()
        return made, engine

    return asyncio.run(run())


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 9])
def test_an_abandoned_episode_keeps_the_tokens_it_has_and_is_never_trained(tokenizer: Tokenizer, after: int) -> None:
    made, engine = play(tokenizer, after=after)
    assert made.check() is None
    assert (made.ended, made.reason) == ("aborted", ABANDONED)
    assert made.failed
    assert after <= made.num_policy_tokens == engine.stats().tokens_generated <= after + 1
    assert len(made.turns) == (0 if after == 0 else 1 if made.num_policy_tokens <= 3 else 2)
    assert engine.stats().running == engine.stats().waiting == 0, "its place is free"
