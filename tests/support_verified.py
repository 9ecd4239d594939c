"""A verifier over a real learner and segment, and real engines that play episodes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from support_run import quick_settings

from async_rl.config import Settings
from async_rl.events import Event
from async_rl.generator.build import make_engine
from async_rl.generator.engine import Engine
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, make_tickets
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import make_task
from async_rl.trainer.build import make_learner
from async_rl.trainer.learner import Learner
from async_rl.trainer.publish import segment_dtype
from async_rl.trainer.team import Team
from async_rl.trainer.verifier import Verifier, make_verifier
from async_rl.trajectory import Trajectory
from async_rl.trajectory.types import group_seed
from async_rl.weights.shared_memory import WeightPublisher
from async_rl.wire import messages as msg


class Bench:
    """Steps move the weights as training does; every version is published and verified against."""

    def __init__(self, model: Path, folder: Path, *overrides: str, size: float = 0.05) -> None:
        self.settings: Settings = quick_settings(model, *overrides)
        self.learner: Learner = make_learner(self.settings)
        self.publisher = WeightPublisher(
            folder / "segment", self.learner.sent(), dtype=segment_dtype(self.settings, self.learner)
        )
        self.verdicts: list[msg.Message] = []
        self.events: list[Event] = []
        self.size = size
        self.verifier: Verifier = make_verifier(
            self.settings,
            self.learner,
            self.publisher,
            team=Team(self.learner.ranks),
            run=str(folder),
            send=self.verdicts.append,
            record=self.events.append,
        )
        self.verifier.replays.over = True  # episodes are not played again here
        self.engine: Engine = make_engine(self.settings, Tokenizer.of(self.settings.model))
        self.task = make_task(self.settings.task.name, self.settings.task.args)
        self.groups = 0
        self.publish()

    def publish(self) -> None:
        self.verifier.held.keep()
        self.publisher.publish(self.learner.sent(), self.learner.version)

    def step(self) -> None:
        """Weights of the next version."""
        generator = torch.Generator().manual_seed(self.learner.version)
        with torch.no_grad():
            for parameter in self.learner.trained().values():
                parameter.add_(self.size * torch.randn(parameter.shape, generator=generator))
        self.learner.version += 1
        self.publish()

    def load(self) -> None:
        """The engine holds the newest weights from now on."""
        weights = {name: tensor.clone() for name, tensor in self.learner.weights().items()}
        asyncio.run(self.engine.load(weights, self.learner.version))

    def play(self, count: int, *, split: Any = "train") -> list[Trajectory]:
        """So many episodes, all at once."""
        return asyncio.run(self._play(count, split))

    async def _play(self, count: int, split: Any) -> list[Trajectory]:
        permit = msg.Permit(
            group=self.groups,
            problem=self.groups % 8,
            split=split,
            samples=tuple(range(count)),
            seed=group_seed(0, self.groups),
            temperature=self.settings.generator.temperature,
        )
        self.groups += 1
        tickets = make_tickets(permit)
        sessions = [
            EpisodeSession(
                engine=self.engine,
                tokenizer=Tokenizer.of(self.settings.model),
                ticket=ticket,
                session_id=1000 * self.groups + ticket.sample,
                max_context=self.engine.max_context,
                max_turns=64,
                generator="g",
            )
            for ticket in tickets
        ]
        made = [
            run_episode(self.task, session, ticket, timeout_s=60.0)
            for session, ticket in zip(sessions, tickets, strict=True)
        ]
        found = list(await asyncio.gather(*made))
        task = getattr(self.engine, "_task", None)
        if task is not None:  # the next event loop begins with a fresh one
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.engine._task = None  # type: ignore[attr-defined]
        return found

    def verify(self, trajectories: Sequence[Trajectory], name: str = "g") -> dict[str, float]:
        """What a step's row says of them."""
        self.verifier.receive(msg.Verify(name=name, session=1, trajectories=tuple(trajectories)))
        self.verifier.work()
        return self.verifier.row()

    def proven(self) -> list[tuple[str, str]]:
        """(generator, lie) of the proofs so far."""
        return [(v.name, v.lie) for v in self.verdicts if isinstance(v, msg.Verdict) and v.proven]

    def close(self) -> None:
        self.verifier.close()
        self.publisher.close()
