"""Episodes of several contexts, agents and temperatures, sampled by a real engine, and judged by the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, make_tickets
from async_rl.model.decoder import Decoder
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Problem, Session, Split, Task
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs
from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack, unpack
from async_rl.wire.messages import Permit

TEMPERATURE = 0.8


class Meeting(Task):
    """A solver and a critic who see different things; the solver goes on, and then begins anew with the same prompt."""

    name = "meeting"

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="3+4=")]

    async def rollout(self, problem: Problem, session: Session) -> float:
        first = await session.generate(max_tokens=5, agent="solver")
        session.append("0")
        await session.generate(max_tokens=4, agent="solver", temperature=0.4)
        number = session.start_context("is it " + "".join(c for c in first if c.isdigit()))
        assert number == 1
        await session.generate(max_tokens=6, agent="critic", temperature=1.5)
        session.resume_context(0)
        session.append("1")
        await session.generate(max_tokens=3, agent="solver")
        session.reward_turn(0.5, agent="critic")
        assert session.start_context("3+4=") == 2
        await session.generate(max_tokens=5, agent="solver")
        session.reward_turn(0.25)
        return 1.0


async def meet(engine: Any, tokenizer: Tokenizer, *, number: int, max_context: int) -> list[Trajectory]:
    """Episodes that run together."""
    permit = Permit(group=0, problem=0, split="train", samples=tuple(range(number)), seed=5, temperature=TEMPERATURE)
    task = Meeting()
    playing = []
    for ticket in make_tickets(permit):
        session = EpisodeSession(
            engine=engine, tokenizer=tokenizer, ticket=ticket, session_id=ticket.sample + 1, max_context=max_context,
            max_turns=9,
        )  # fmt: skip
        playing.append(run_episode(task, session, ticket, timeout_s=60.0))
    return [unpack(pack(t)) for t in await asyncio.gather(*playing)]


def judge(trajectories: Sequence[Trajectory], model: Decoder, tolerance: float) -> None:
    """The engine recorded what the trainer computes; contexts, agents, temperatures are as the task had them."""
    for t in trajectories:
        assert t.reason == ""
        assert len(t.contexts) == 2
        assert [turn.agent for turn in t.turns] == ["solver", "solver", "solver", "critic", "solver"]
        assert [turn.temperature for turn in t.turns] == [0.0, 0.4, 0.0, 1.5, 0.0]
        assert [turn.reward for turn in t.turns] == [0.0, 0.0, 0.0, 0.5, 0.25]
        first, *_, last = t.turns
        begin = t.contexts[-1]
        assert t.tokens[: first.start].tolist() == t.tokens[begin : last.start].tolist(), "one prompt, twice"
    packed = pack_batch(trajectories, micro_batch_tokens=1000)
    found = batch_log_probs(model, packed, ModelArithmetic(temperature=TEMPERATURE)).log_prob.numpy()
    difference = np.abs(found - packed.log_behaviour.numpy())
    assert difference.max() < tolerance
    # the noise of a context is its own: two answers to one prompt are not the same
    spoken = [t.tokens[turn.start : turn.start + turn.length].tolist() for t in trajectories for turn in t.turns]
    assert sum(spoken[5 * i] == spoken[5 * i + 4] for i in range(len(trajectories))) < len(trajectories)
