"""Episodes in pieces: what they say together is what the whole episode says, token by token, each sampled once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support_run import quick_settings

from async_rl.buffer.sampler import StartChoice
from async_rl.buffer.starts import start_from
from async_rl.config import Settings
from async_rl.generator.build import make_engine
from async_rl.generator.engine import Engine
from async_rl.generator.episodes import Episodes
from async_rl.generator.replay import Replayed, Replayer
from async_rl.generator.start import OTHER_WAY
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import make_task
from async_rl.task.protocol import Problem, Session, Split, Task
from async_rl.trajectory import Trajectory
from async_rl.trajectory.given import OPEN, given_in, wrong_given
from async_rl.wire.messages import Permit

PERMIT = Permit(group=0, problem=5, split="train", samples=(0,), seed=3, temperature=1.0)


@dataclass
class Player:
    """A generator's episodes, one permit at a time."""

    settings: Settings
    task: Task
    window: int
    record: Trajectory | None = None
    """finished turns of a generator that was lost"""

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.of(self.settings.model)
        self.saved: list[Trajectory] = []

    async def play(self, engine: Engine, permit: Permit, episodes: Episodes | None = None) -> Trajectory:
        found: list[Trajectory] = []
        episodes = episodes or self.episodes(engine)
        episodes.on_finished = found.append
        if self.record is not None:
            episodes.record_turns([self.record])
        episodes.start(permit, permit.samples)
        while episodes.running:
            await asyncio.sleep(0)
            self.saved += episodes.take_unsent()
        (made,) = found
        return made

    def episodes(self, engine: Engine) -> Episodes:
        return Episodes(
            task=self.task,
            engine=engine,
            tokenizer=self.tokenizer,
            generator="g",
            max_turns=12,
            timeout_s=60.0,
            save_turns_after_s=0.0,
            on_finished=lambda made: None,
            on_change=lambda: None,
            window=self.window,
        )

    def chain(self, *, engines: int = 1) -> tuple[list[Trajectory], list[int]]:
        """The pieces of an episode, each played by the next of so many generators; tokens that each prefilled."""

        async def run() -> tuple[list[Trajectory], list[int]]:
            made: list[Trajectory] = []
            all_engines = [make_engine(self.settings, self.tokenizer) for _ in range(engines)]
            all_episodes = [self.episodes(engine) for engine in all_engines]
            permit, fed = PERMIT, []
            while True:
                at = len(made) % engines
                before = all_engines[at].stats().tokens_prefilled
                made.append(await self.play(all_engines[at], permit, all_episodes[at]))
                fed.append(all_engines[at].stats().tokens_prefilled - before)
                if made[-1].ended != "window":
                    break
                permit = follow(made[-1])
            for engine in all_engines:
                await engine.close()
            return made, fed

        return asyncio.run(run())


def follow(piece: Trajectory) -> Permit:
    """The permit in which a piece goes on."""
    start = start_from(piece, StartChoice(source="window", share=1.0, group=piece.group, sample=0))
    return replace(PERMIT, group=piece.group + 1, start=start)


def windowed(model: Path, window: int) -> Settings:
    words = ["task.args.max_turns=12", "batch.group_size=1", f"rollout.window={window}", "recipe=t_ppo"]
    return quick_settings(model, *words)


def player(model: Path, window: int, task: Task | None = None) -> Player:
    settings = quick_settings(model, "task.args.max_turns=12", "batch.group_size=1")
    return Player(settings, task or make_task(settings.task.name, settings.task.args), window)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_pieces_of_an_episode_say_what_the_whole_episode_says(tiny_model: Path, window: int) -> None:
    (whole,), _ = player(tiny_model, 0).chain()
    for engines in (1, 2):
        pieces, fed = player(tiny_model, window).chain(engines=engines)
        last, sampled = pieces[-1], whole.policy_positions().tolist()
        assert len(pieces) == max(1, -(-len(sampled) // window))
        assert last.tokens.tolist() == whole.tokens.tolist()
        assert (last.reward, last.ended) == (whole.reward, whole.ended)
        assert [p for piece in pieces for p in piece.policy_positions().tolist()] == sampled  # each once, in order
        for piece in pieces:
            own = piece.policy_positions()
            np.testing.assert_allclose(piece.log_behaviour[own], whole.log_behaviour[own], atol=1e-5)
            assert piece.check() is None
            if (given := given_in(piece)) is not None:
                assert not wrong_given(piece)
                places = [p for start, length in given.stretches for p in range(start, start + length)]
                assert places + own.tolist() == sampled[: len(places) + len(own)]
        replayer = dataclasses.replace(Replayer.of(windowed(tiny_model, window)), whole=True)
        for piece in pieces:
            assert replayer.replay(piece) == Replayed(played=True)  # what verifies it finds nothing wrong
        for piece in pieces[:-1]:
            assert (piece.ended, piece.reward, piece.num_policy_tokens) == ("window", 0.0, window)
        if engines == 1:  # its cache was kept: nothing but the environment's answers is fed again
            assert sum(fed) <= len(whole.tokens)
    ends = {turn.start + turn.length for turn in whole.turns}
    cuts = {piece.policy_positions()[-1] + 1: piece.info[OPEN] for piece in pieces[:-1]}
    assert cuts == {place: "between" if place in ends else "turn" for place in cuts}


@dataclass
class Moody:
    """Answers what `mood` says; two turns of up to six tokens."""

    mood: Callable[[int], str]
    name: str = "moody"
    catches: bool = False
    played: int = 0

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=i, prompt="123") for i in range(6)]

    async def rollout(self, problem: Problem, session: Session) -> float:
        self.played += 1
        for turn in range(3):
            try:
                await session.generate(max_tokens=6)
            except Exception:
                if not self.catches:
                    raise
                return 1.0
            session.append(self.mood(self.played + turn))
        return 0.5


def test_a_piece_is_a_piece_whatever_the_task_makes_of_that(tiny_model: Path) -> None:
    pieces, _ = player(tiny_model, 2, Moody(lambda n: "1", catches=True)).chain()  # type: ignore[arg-type]
    assert [piece.ended for piece in pieces[:-1]] == ["window"] * (len(pieces) - 1)
    assert {piece.reward for piece in pieces[:-1]} == {0.0}
    assert pieces[-1].reward == 0.5


def test_an_episode_whose_environment_answers_otherwise_does_not_go_on(tiny_model: Path) -> None:
    pieces, _ = player(tiny_model, 2, Moody(lambda n: "12"[n % 2])).chain()  # type: ignore[arg-type]
    assert pieces[-1].ended == "error"
    assert OTHER_WAY in pieces[-1].reason
    assert len(pieces) > 1


def test_a_lost_piece_goes_on_behind_its_start_and_its_turns(tiny_model: Path) -> None:
    first, *_ = player(tiny_model, 9, Moody(lambda n: "1")).chain()[0]  # type: ignore[arg-type]
    assert first.ended == "window"

    def second(record: Trajectory | None) -> tuple[Trajectory, list[Trajectory]]:
        one = player(tiny_model, 9, Moody(lambda n: "1"))  # type: ignore[arg-type]
        one.record = record

        async def run() -> Trajectory:
            engine = make_engine(one.settings, one.tokenizer)
            try:
                return await one.play(engine, follow(first))
            finally:
                await engine.close()

        return asyncio.run(run()), one.saved

    whole, saved = second(None)
    assert saved
    for record in saved:
        again, _ = second(record)
        assert (again.tokens.tolist(), again.turns, again.info) == (whole.tokens.tolist(), whole.turns, whole.info)
        assert again.reward == whole.reward


class Talkative(Moody):
    async def rollout(self, problem: Problem, session: Session) -> float:
        session.start_context("124")
        for _ in range(3):
            await session.generate(max_tokens=4)
            session.append("1")
        return 1.0


def test_an_episode_of_several_contexts_is_whole(tiny_model: Path) -> None:
    task: Any = Talkative(lambda n: "1")
    (made,), _ = player(tiny_model, 2, task).chain()
    assert made.ended == "finished"
    assert made.num_policy_tokens > 2
