"""Episodes whose code runs in processes of their own come to the trajectories that they would come to in the generator;
one that hangs or crashes costs nobody else anything. Real processes; the engine is a fake that says the same always."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from msgspec.structs import replace
from support_models import qwen3_config, write_folder

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, Engine, Request
from async_rl.generator.places import Slots
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket
from async_rl.generator.task_code import TaskGuard
from async_rl.generator.task_pool import FarTask, TaskPool
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Task, make_task
from async_rl.trajectory import Trajectory
from async_rl.wire.messages import Permit

Found = TypeVar("Found")

TASK = '''
import asyncio, os, pathlib, time
from dataclasses import dataclass
from async_rl.task.protocol import Problem, Task

async def everything(problem, session):
    assert not session.truncated and session.turn == 0 and session.split == "train"
    first = await session.generate(max_tokens=5, stop=("x",), temperature=0.5, agent="one")
    session.append("to be sure")
    session.reward_turn(0.25)
    session.note_turn("mark", 3.0)
    session.note_tokens("each", [0.5] * len(session.said[-1].tokens))
    number = session.start_context("another beginning")
    await session.generate(max_tokens=5, state_key=9)
    session.resume_context(0)
    score = await session.score("abc")
    session.note("scored", score.total)
    session.note("seed", str(session.seed))
    async with session.slot("place"):
        session.note("text", first)
    session.end_at_turn_limit()
    return {"length": float(len(session.said)), "stopped": float(session.stopped)}

async def raises(problem, session):
    await session.generate(max_tokens=5)
    raise KeyError("gold")

async def exits(problem, session):
    await session.generate(max_tokens=5)
    os._exit(7)

async def hangs(problem, session):
    await session.generate(max_tokens=5)
    while True:
        time.sleep(0.01)

async def too_many(problem, session):
    while True:
        await session.generate(max_tokens=5)

async def wrong(problem, session):
    return "a text"

async def blocks(problem, session):
    """Holds this process until another one has said its word."""
    while not pathlib.Path(session.template or os.environ["WORD"]).exists():
        time.sleep(0.01)
    return 1.0

async def refused(problem, session):
    try:
        await session.generate(max_tokens=5, temperature=-1.0)
    except ValueError as error:
        session.note("refused", str(error))
    try:
        session.keep(1)
    except RuntimeError:
        return 0.5

ROLLOUTS = [everything, raises, exits, hangs, too_many, wrong, blocks, refused]

class Kinds(Task):
    slots = {"place": 1}
    def problems(self, split):
        return [Problem(index=i, prompt="begin") for i in range(len(ROLLOUTS))]
    async def setup(self):
        if os.environ.get("NO_SETUP"):
            raise OSError("the door is shut")
    async def rollout(self, problem, session):
        return await ROLLOUTS[problem.index](problem, session)
    async def teardown_episode(self, problem, session):
        if problem.index == 1:
            raise ValueError("it cannot be put back")
'''
EVERYTHING, RAISES, EXITS, HANGS, TOO_MANY, WRONG, BLOCKS, REFUSED = range(8)
GUARD = TaskGuard(limit_s=2.0)


PERMIT = Permit(group=4, problem=0, split="train", samples=(0, 1), seed=0, temperature=1.0)


class ConstantEngine:
    """Three tokens a turn, and the same log-prob for every one."""

    version = 3
    max_context = 200

    async def generate(self, request: Request) -> Completion:
        await asyncio.sleep(0)
        return Completion(tokens=[4, 5, 6], log_probs=[-0.5] * 3, versions=[3] * 3, finish="stop")

    def release(self, session: int) -> None:
        pass

    async def probe(self, tokens: list[int]) -> list[float]:
        await asyncio.sleep(0)
        return [-0.5] * (len(tokens) - 1)

    def sampled(self, session: int) -> tuple[int, ...]:
        return ()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model"), qwen3_config()))


@pytest.fixture
def name(tmp_path: Path) -> str:
    (tmp_path / "kinds.py").write_text(TASK)
    return f"{tmp_path}/kinds.py:Kinds"


@asynccontextmanager
async def pool_of(name: str, count: int) -> AsyncIterator[tuple[Task, TaskPool]]:
    pool = TaskPool(name=name, args={}, count=count)
    far = cast(Task, FarTask(make_task(name, {}), pool))
    await far.setup()
    try:
        yield far, pool
    finally:
        await far.teardown()


async def played(task: Task, tokenizer: Tokenizer, problem: int, *, guard: TaskGuard = GUARD) -> Trajectory:
    ticket = Ticket(permit=replace(PERMIT, problem=problem), sample=1, seed=7)
    session = EpisodeSession(
        engine=cast(Engine, ConstantEngine()), tokenizer=tokenizer, ticket=ticket, session_id=1, max_context=100,
        max_turns=5, slots=Slots({"place": 1}), clock=lambda: 0.0,
    )  # fmt: skip
    return await run_episode(task, session, ticket, timeout_s=20.0, guard=guard)


def run(work: Callable[[], Awaitable[Found]]) -> Found:
    async def whole() -> Found:
        return await work()

    return asyncio.run(whole())


@pytest.mark.parametrize("problem", [EVERYTHING, RAISES, TOO_MANY, WRONG])
def test_an_episode_comes_to_the_same_trajectory_there_and_here(tokenizer: Tokenizer, name: str, problem: int) -> None:
    async def both() -> tuple[Trajectory, Trajectory]:
        async with pool_of(name, 1) as (far, _):
            return await played(far, tokenizer, problem), await played(make_task(name, {}), tokenizer, problem)

    there, here = run(both)
    assert there.tokens.tolist() == here.tokens.tolist()
    assert there.turns == here.turns
    assert (there.reward, there.ended, dict(there.info)) == (here.reward, here.ended, dict(here.info))
    assert there.contexts == here.contexts
    if problem == WRONG:
        assert "could not convert string to float: 'a text'" in there.reason
    else:
        assert there.reason == here.reason


def test_many_episodes_run_at_once_in_few_processes(tokenizer: Tokenizer, name: str) -> None:
    async def all_of_them() -> list[Trajectory]:
        async with pool_of(name, 2) as (far, _):
            kinds = [EVERYTHING, RAISES, TOO_MANY, REFUSED] * 60
            return await asyncio.gather(*(played(far, tokenizer, kind, guard=TaskGuard()) for kind in kinds))

    made = run(all_of_them)
    assert [one.ended for one in made] == ["turn_limit", "error", "turn_limit", "finished"] * 60


def test_what_the_session_refuses_is_raised_in_the_process(tokenizer: Tokenizer, name: str) -> None:
    async def one() -> Trajectory:
        async with pool_of(name, 1) as (far, _):
            return await played(far, tokenizer, REFUSED)

    made = run(one)
    assert made.reward == 0.5
    assert "temperature is -1" in str(made.info["refused"])


def test_a_process_that_crashes_fails_its_episodes_and_another_one_goes_on(tokenizer: Tokenizer, name: str) -> None:
    async def three() -> tuple[Trajectory, Trajectory, int]:
        async with pool_of(name, 1) as (far, pool):
            first = pool.workers[0].process.pid
            crashed = await played(far, tokenizer, EXITS)
            after = await played(far, tokenizer, EVERYTHING)
            assert pool.workers[0].process.pid != first
            return crashed, after, len(pool.workers)

    crashed, after, left = run(three)
    assert (crashed.ended, after.ended, left) == ("error", "turn_limit", 1)
    assert "the process of the task that ran it ended with code 7" in crashed.reason
    assert len(crashed.turns) == 1


def test_a_process_that_never_comes_back_is_ended_and_the_reason_told(tokenizer: Tokenizer, name: str) -> None:
    async def two() -> tuple[Trajectory, Trajectory]:
        async with pool_of(name, 1) as (far, _):
            hung = await played(far, tokenizer, HANGS, guard=TaskGuard(limit_s=0.5))
            return hung, await played(far, tokenizer, EVERYTHING)

    hung, after = run(two)
    assert hung.ended == "error"
    assert "took more than 0.5 s (generator.task_timeout_s)" in hung.reason
    assert after.ended == "turn_limit"


def test_code_that_holds_a_process_holds_up_nobody_else(
    tokenizer: Tokenizer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by the generator itself, this would never end: its loop could not write the word."""
    monkeypatch.setenv("WORD", str(tmp_path / "word"))

    async def both() -> tuple[Trajectory, Trajectory]:
        async with pool_of(name, 2) as (far, pool):
            held = asyncio.create_task(played(far, tokenizer, BLOCKS, guard=TaskGuard(limit_s=15.0)))
            while not pool.workers[0].places and not pool.workers[1].places:
                await asyncio.sleep(0)
            other = await played(far, tokenizer, EVERYTHING)
            assert not held.done()
            assert pool.busy_seconds > 0
            (tmp_path / "word").touch()
            return await held, other

    held, other = run(both)
    assert (held.reward, held.ended) == (1.0, "finished")
    assert other.ended == "turn_limit"


def test_a_task_that_cannot_be_set_up_ends_the_generator_with_the_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_SETUP", "1")

    async def begin() -> Any:
        async with pool_of(name, 2):
            pass

    with pytest.raises(RunFailed, match=r"generator\.task_processes\): OSError: the door is shut"):
        run(begin)
