"""An episode whose generator was lost goes on behind its last finished turn, on the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from msgspec.structs import replace
from support_models import qwen3_config, write_folder

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, Request
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import STOPS, EpisodeSession, Ticket
from async_rl.model.tokenizer import Tokenizer
from async_rl.task.protocol import Problem, Session, Split
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack, unpack
from async_rl.wire.messages import Permit


@dataclass
class SeededEngine:
    """Tokens that depend on the history's length only; counts what it is asked."""

    version: int = 3
    max_context: int = 200
    asked: list[int] = field(default_factory=list)
    dies_at: int = -1
    """the request that never comes back"""

    async def generate(self, request: Request) -> Completion:
        if len(self.asked) == self.dies_at:
            raise RunFailed("the engine died")
        start = len(request.tokens)
        self.asked.append(start)
        length = 2 + start % 3
        return Completion(
            tokens=[2 + (start + i) % 7 for i in range(length)],
            log_probs=[-0.25 * (1 + (start + i) % 4) for i in range(length)],
            versions=[self.version] * length,
            finish="stop" if start % 2 else "length",
        )

    def release(self, session: int) -> None:
        pass


@dataclass
class Conversation:
    """Four turns; the environment's answers depend on what was said and on whether it stopped."""

    moods: str = "abcd"
    name: str = "conversation"

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc")]

    async def rollout(self, problem: Problem, session: Session) -> float:
        total = 0.0
        for mood in self.moods:
            said = await session.generate(max_tokens=9, state_key=ord(mood))
            session.reward_turn(float(len(said)))
            session.append(mood + ("x" if session.stopped else "y"))
            total += len(said)
        session.note("moods", self.moods)
        return total


PERMIT = Permit(group=4, problem=0, split="train", samples=(1,), seed=0, temperature=1.0)
TICKET = Ticket(permit=PERMIT, sample=1, seed=7)


def play(
    tokenizer: Tokenizer, engine: SeededEngine, *, moods: str = "abcd", record: Trajectory | None = None
) -> tuple[Trajectory | None, EpisodeSession, list[Trajectory]]:
    """The trajectory (None: the generator died), its session, what was saved after each turn."""
    saved: list[Trajectory] = []
    session = EpisodeSession(
        engine=engine, tokenizer=tokenizer, ticket=TICKET, session_id=1, max_context=200, max_turns=9,  # type: ignore[arg-type]
        clock=lambda: 5.0, record=record, on_turn=lambda: saved.append(session.so_far()),
    )  # fmt: skip
    try:
        return asyncio.run(run_episode(Conversation(moods), session, TICKET, timeout_s=9.0)), session, saved
    except RunFailed:
        return None, session, saved


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_lost_episode_goes_on_behind_its_last_turn_as_if_nothing_had_been(tokenizer: Tokenizer, turns: int) -> None:
    whole, _, _ = play(tokenizer, SeededEngine())
    assert whole is not None
    lost, _, saved = play(tokenizer, SeededEngine(dies_at=turns))
    assert lost is None
    assert len(saved) == turns
    record = unpack(pack(saved[-1]))
    assert record.check() is None
    assert record.failed, "never trained as it is"

    engine = SeededEngine()
    again, session, saved_again = play(tokenizer, engine, record=record)

    assert again is not None
    assert pack(again) == pack(whole)
    assert not session.diverged
    assert len(engine.asked) == 4 - turns, "only the missing turns are sampled"
    assert [len(t.turns) for t in saved_again] == list(range(turns + 1, 5))


def test_tokens_of_the_record_keep_their_version_and_the_new_ones_have_theirs(tokenizer: Tokenizer) -> None:
    _, _, saved = play(tokenizer, SeededEngine(version=3, dies_at=2))
    again, _, _ = play(tokenizer, SeededEngine(version=5), record=saved[-1])
    assert again is not None
    assert (again.version_min, again.version_max) == (3, 5)
    by_turn = np.split(again.policy_versions(), np.cumsum([t.length for t in again.turns])[:-1])
    assert [set(versions.tolist()) for versions in by_turn] == [{3}, {3}, {5}, {5}]


def test_a_record_of_another_environment_is_dropped(tokenizer: Tokenizer) -> None:
    _, _, saved = play(tokenizer, SeededEngine(dies_at=3))
    made, session, _ = play(tokenizer, SeededEngine(), moods="azcd", record=saved[-1])
    assert session.diverged
    assert made is not None
    assert made.failed, "its caller begins anew"


@pytest.mark.parametrize("info", [{}, {STOPS: "1"}, {STOPS: 3.0}])
def test_a_malformed_record_is_dropped(tokenizer: Tokenizer, info: dict[str, float | str]) -> None:
    _, _, saved = play(tokenizer, SeededEngine(dies_at=3))
    _, session, _ = play(tokenizer, SeededEngine(), record=replace(saved[-1], info=info))
    assert session.diverged


@dataclass
class Noting(Conversation):
    """Notes every turn and its tokens; forwards what a note is refused for."""

    async def rollout(self, problem: Problem, session: Session) -> float:
        for number in range(2):
            await session.generate(max_tokens=9)
            session.note_turn("number", number)
            session.note_turn("void", number)
            session.note_turn("void", 0.5)  # the last word counts
            session.note_tokens("teacher", [-0.5] * len(session.said[-1].tokens))
            session.append("x")
        with pytest.raises(ValueError, match="for a turn of"):
            session.note_tokens("teacher", [0.0] * 99)
        with pytest.raises(ValueError, match="must be a finite number"):
            session.note_turn("void", float("nan"))
        return 1.0


def test_notes_on_turns_and_tokens_are_in_the_trajectory(tokenizer: Tokenizer) -> None:
    session = EpisodeSession(
        engine=SeededEngine(), tokenizer=tokenizer, ticket=TICKET, session_id=1, max_context=200, max_turns=9,  # type: ignore[arg-type]
    )  # fmt: skip
    found = unpack(pack(asyncio.run(run_episode(Noting(), session, TICKET, timeout_s=9.0))))
    assert found.ended == "finished", found.reason
    assert [turn.notes for turn in found.turns] == [(("number", n), ("void", 0.5)) for n in (0.0, 1.0)]
    assert [turn.token_notes for turn in found.turns] == [(("teacher", (-0.5,) * t.length),) for t in found.turns]
