"""Whatever a task or its reward does, its episode ends in exactly one trajectory, or the generator ends with the cause.

The engine is a fake that says the same thing every time.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support_models import qwen3_config, write_folder

from async_rl.errors import RunFailed
from async_rl.generator.engine import Completion, LogitsNotFinite, Request
from async_rl.generator.episodes import Episodes
from async_rl.generator.rollout import run_episode
from async_rl.generator.session import EpisodeSession, Ticket
from async_rl.generator.task_code import TaskGuard, run_to_end
from async_rl.model.tokenizer import Tokenizer
from async_rl.process import Interrupted, Terminated
from async_rl.task.protocol import Problem, Session, Split
from async_rl.task.reward import Reward
from async_rl.trajectory import Trajectory
from async_rl.trajectory.codec import pack
from async_rl.wire.messages import Permit

PERMIT = Permit(group=4, problem=0, split="train", samples=(0, 1), seed=0, temperature=1.0)
TICKET = Ticket(permit=PERMIT, sample=1, seed=7)
SOON_S = 5.0


class ConstantEngine:
    """Three tokens a turn, unless it is told to raise."""

    version = 3
    max_context = 200

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    async def generate(self, request: Request) -> Completion:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return Completion(tokens=[4, 5, 6], log_probs=[-0.5] * 3, versions=[3] * 3, finish="stop")

    def release(self, session: int) -> None:
        pass


@dataclass
class OneTurn:
    """One turn, judged by `judge`, which may be a coroutine function."""

    judge: Callable[..., Any]
    name: str = "one turn"

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc", data={"answer": ""})]

    async def rollout(self, problem: Problem, session: Session) -> float:
        text = await session.generate(max_tokens=9)
        return await Reward("mine", self.judge).score(text, "", problem)


class Bare(OneTurn):
    """Its rollout is `judge(session)`."""

    async def rollout(self, problem: Problem, session: Session) -> float:
        return await self.judge(session)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """No test here may wait for anything."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 2 * SOON_S


def play(
    tokenizer: Tokenizer,
    task: OneTurn,
    *,
    engine: ConstantEngine | None = None,
    timeout_s: float = 60.0,
    limit_s: float = 0.0,
) -> Trajectory:
    engine = engine or ConstantEngine()

    async def run() -> Trajectory:
        session = EpisodeSession(
            engine=engine, tokenizer=tokenizer, ticket=TICKET, session_id=1, max_context=200, max_turns=9  # type: ignore[arg-type]
        )  # fmt: skip
        guard = TaskGuard(limit_s=limit_s)
        with guard.alarm():
            return await run_episode(task, session, TICKET, timeout_s=timeout_s, guard=guard)

    made = run_to_end(run())
    pack(made)  # it can be sent
    return made


class TimedOut(BaseException):
    """As packages that bound the time of a call define it."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


async def leaks(*_: object) -> float:
    request = asyncio.ensure_future(asyncio.sleep(60))
    await asyncio.sleep(0)
    request.cancel()
    await request
    return 1.0


async def cancels_itself(*_: object) -> float:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(60)
    return 1.0


def recurses(*_: object) -> float:
    return recurses() + 1


def raising(error: BaseException) -> Callable[..., float]:
    def judge(*_: object) -> float:
        raise error

    return judge


def nothing_left(*_: object) -> float:
    return next(iter(()))


async def raises_later(*_: object) -> float:
    await asyncio.sleep(0)
    raise SystemExit("in a coroutine")


HERE = r" \(test_task_code\.py:\d+ \w+\)$"


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (leaks, "CancelledError" + HERE),
        (cancels_itself, "CancelledError" + HERE),
        (raising(TimedOut("more than 5 s")), "TimedOut: more than 5 s" + HERE),
        (raising(SystemExit("bad input")), "SystemExit: bad input" + HERE),
        (raising(SystemExit(0)), "SystemExit: 0" + HERE),
        (raises_later, "SystemExit: in a coroutine" + HERE),
        (raising(KeyboardInterrupt("not by a signal")), "KeyboardInterrupt: not by a signal" + HERE),
        (raising(GeneratorExit()), "GeneratorExit" + HERE),
        (raising(TimeoutError("sandbox")), "RewardError: reward 'mine' raised TimeoutError: sandbox" + HERE),
        (nothing_left, "RewardError: reward 'mine' raised RuntimeError: coroutine raised StopIteration" + HERE),
        (recurses, "RewardError: reward 'mine' raised RecursionError: .*"),
        (raising(KeyError("\ud800")), r"RewardError: .*KeyError"),
        (raising(Unspeakable()), r"RuntimeError: no words" + HERE),
        (lambda *_: float("inf"), "RewardError: reward 'mine' returned inf"),
    ],
)
def test_what_a_reward_raises_ends_its_trajectory_with_type_text_and_place(
    tokenizer: Tokenizer, judge: Callable[..., Any], reason: str
) -> None:
    made = play(tokenizer, OneTurn(judge))
    assert made.ended == "error"
    assert re.match(reason, made.reason), made.reason
    assert made.num_policy_tokens == 3
    assert made.check() is None


async def times_out(session: Session) -> float:
    raise TimeoutError("sandbox")


def test_a_timeout_of_the_tasks_own_is_not_taken_for_the_episodes(tokenizer: Tokenizer) -> None:
    assert "TimeoutError: sandbox" in play(tokenizer, Bare(times_out)).reason


@pytest.mark.parametrize("order", [Interrupted("SIGINT"), Terminated(143)])
def test_only_an_order_of_the_products_own_passes(tokenizer: Tokenizer, order: BaseException) -> None:
    with pytest.raises(type(order)):
        play(tokenizer, OneTurn(raising(order)))


async def swallows(session: Session) -> float:
    with suppress(BaseException):
        await session.generate(max_tokens=3)
    return 1.0


def test_an_engines_failure_is_told_whatever_the_task_makes_of_it(tokenizer: Tokenizer) -> None:
    made = play(tokenizer, Bare(swallows), engine=ConstantEngine(LogitsNotFinite(3)))
    assert (made.ended, made.reason) == ("error", "the model's logits are not finite under weights of version 3")
    with pytest.raises(RunFailed, match="dead"):
        play(tokenizer, Bare(swallows), engine=ConstantEngine(RunFailed("dead")))


class NanEngine(ConstantEngine):
    async def generate(self, request: Request) -> Completion:
        return Completion(tokens=[4, 5], log_probs=[-0.5, float("nan")], versions=[3, 4], finish="stop")


def test_log_probs_that_are_no_numbers_are_named_with_their_version_whatever_the_engine(tokenizer: Tokenizer) -> None:
    made = play(tokenizer, OneTurn(lambda *_: 1.0), engine=NanEngine())
    assert (made.ended, made.reason) == ("error", "the model's logits are not finite under weights of version 4")


# ---------------------------------------------------------------- that do not come back


async def stops_the_loop(*_: object) -> float:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    return 1.0


def leaves_behind(raises: Callable[[], object]) -> Callable[..., Any]:
    """A reward that leaves something in the event loop which raises what asyncio lets through."""

    async def judge(*_: object) -> float:
        async def later() -> None:
            raises()

        asyncio.get_running_loop().create_task(later())
        asyncio.get_running_loop().call_soon(raises)
        await asyncio.sleep(0.01)
        return 1.0

    return judge


def interrupts() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (stops_the_loop, "the task or its reward stopped the event loop; the event loop goes on"),
        (leaves_behind(lambda: sys.exit("later")), "the task or its reward raised SystemExit: later"),
        (leaves_behind(interrupts), "the task or its reward raised KeyboardInterrupt"),
        (leaves_behind(lambda: next(iter(()))), ""),
    ],
)
def test_what_is_left_in_the_event_loop_ends_neither_it_nor_the_generator(
    tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str], judge: Callable[..., Any], said: str
) -> None:
    assert play(tokenizer, OneTurn(judge)).reward == 1.0
    assert said in capfd.readouterr().err


async def stubborn(session: Session) -> float:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


async def in_a_thread(session: Session) -> float:
    return await asyncio.to_thread(time.sleep, 2 * SOON_S) or 1.0


@pytest.mark.parametrize("rollout", [stubborn, in_a_thread])
def test_an_episode_ends_in_time_whatever_its_task_waits_for(tokenizer: Tokenizer, rollout: Callable[..., Any]) -> None:
    made = play(tokenizer, Bare(rollout), timeout_s=0.2)
    assert (made.ended, made.reason) == ("error", "the episode took more than 0.2 s")
    made = play(tokenizer, Bare(rollout), limit_s=0.2)
    assert made.ended == "error"
    assert re.match(
        r"the task or its reward took more than 0\.2 s \(generator\.task_timeout_s\) in test_task_code\.py:\d+ "
        + rollout.__name__,
        made.reason,
    )


def backtracks(*_: object) -> float:
    re.match(r"^(\w+\s?)*$", "a" * 40 + "!")
    return 1.0


def loops(*_: object) -> float:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("judge", [backtracks, loops])
def test_a_reward_that_holds_up_everything_is_ended_and_named(tokenizer: Tokenizer, judge: Callable[..., Any]) -> None:
    made = play(tokenizer, OneTurn(judge), limit_s=1.0)
    assert made.ended == "error"
    assert re.match(
        rf"the task or its reward held up all episodes for \d+ s in test_task_code\.py:\d+ {judge.__name__} ",
        made.reason,
    )
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_one_that_swallows_its_end_ends_the_process(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.generator.task_code.ALARM_S", 0.02)
    monkeypatch.setattr("async_rl.generator.task_code.LEAST_S", 0.02)
    told: list[str] = []

    def swallows_all(*_: object) -> float:
        while not told:
            with suppress(BaseException):
                time.sleep(1.0)
        return 1.0

    async def run() -> None:
        guard = TaskGuard(limit_s=0.02, on_stuck=told.append)

        async def judge() -> None:
            swallows_all()

        with guard.alarm():
            await guard.steps(judge())

    run_to_end(run())
    assert "swallows_all" in told[0]
    assert "went on" in told[0]


def test_what_an_ended_episode_left_running_gets_no_more_turns(tokenizer: Tokenizer) -> None:
    later: list[BaseException] = []

    async def leaves_one(session: Session) -> float:
        async def more() -> None:
            await asyncio.sleep(0)
            try:
                await session.generate(max_tokens=3)
            except BaseException as error:
                later.append(error)

        asyncio.get_running_loop().create_task(more())
        return 1.0

    async def run() -> Trajectory:
        session = EpisodeSession(
            engine=ConstantEngine(), tokenizer=tokenizer, ticket=TICKET, session_id=1, max_context=200, max_turns=9  # type: ignore[arg-type]
        )  # fmt: skip
        made = await run_episode(Bare(leaves_one), session, TICKET, timeout_s=9.0)
        await asyncio.sleep(0.05)
        return made

    made = run_to_end(run())
    assert made.ended == "finished"
    assert len(later) in (0, 1)
    assert all("the episode is over" in str(error) for error in later)


# ---------------------------------------------------------------- through the generator's own bookkeeping


def make_episodes(tokenizer: Tokenizer, task: OneTurn, done: list[Trajectory]) -> Episodes:
    return Episodes(
        task=task,  # type: ignore[arg-type]
        engine=ConstantEngine(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        generator="generator-0",
        max_turns=9,
        timeout_s=60.0,
        save_turns_after_s=60.0,
        on_finished=done.append,
        on_change=lambda: None,
    )


async def settle(episodes: Episodes) -> None:
    until = time.monotonic() + SOON_S
    while episodes.running and not episodes.failed.is_set() and time.monotonic() < until:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("judge", [leaks, raises_later, raising(TimedOut("x")), cancels_itself])
def test_every_permitted_sample_comes_back_once(tokenizer: Tokenizer, judge: Callable[..., Any]) -> None:
    done: list[Trajectory] = []

    async def run() -> None:
        episodes = make_episodes(tokenizer, OneTurn(judge), done)
        episodes.start(PERMIT, PERMIT.samples)
        await settle(episodes)
        assert not episodes.running

    run_to_end(run())
    assert sorted(made.sample for made in done) == [0, 1]
    assert {made.ended for made in done} == {"error"}


async def cancels_everybody(session: Session) -> float:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(60)
    return 1.0


def test_a_task_that_cancels_everybody_ends_its_episodes_and_nothing_hangs(tokenizer: Tokenizer) -> None:
    done: list[Trajectory] = []

    async def run() -> None:
        episodes = make_episodes(tokenizer, Bare(cancels_everybody), done)
        episodes.start(PERMIT, PERMIT.samples)
        try:
            await settle(episodes)
        except asyncio.CancelledError:  # this coroutine was cancelled too
            await settle(episodes)

    run_to_end(run())
    assert sorted(made.sample for made in done) == [0, 1]


def test_an_episode_that_makes_no_trajectory_ends_the_generator_with_the_cause(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(EpisodeSession, "finish", broken)

    async def run() -> str:
        episodes = make_episodes(tokenizer, OneTurn(lambda *_: 1.0), [])
        episodes.start(PERMIT, (0,))
        await asyncio.wait_for(episodes.failed.wait(), SOON_S)
        return str(episodes.failure)

    assert "sample 0 of group 4 ended without a trajectory: ZeroDivisionError: ours" in run_to_end(run())


def test_given_up_episodes_are_gone_without_a_trajectory(tokenizer: Tokenizer) -> None:
    done: list[Trajectory] = []

    async def run() -> int:
        episodes = make_episodes(tokenizer, Bare(stubborn), done)
        episodes.start(PERMIT, PERMIT.samples)
        await asyncio.sleep(0.05)
        return await episodes.cancel(timeout_s=1.0)

    assert run_to_end(run()) == 2
    assert done == []


# ---------------------------------------------------------------- what they change in the process


def changes_everything(folder: Path) -> Callable[..., float]:
    def judge(*_: object) -> float:
        os.chdir(folder)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        sys.setrecursionlimit(sys.getrecursionlimit() + 17)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(0)
        for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
            soft, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (1000 if soft == resource.RLIM_INFINITY else soft - 1, hard))
        return 1.0

    return judge


def test_what_a_reward_changes_in_the_process_is_put_back(
    tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> tuple[Any, ...]:
        return (
            os.getcwd(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.zeros(1).device,
            sys.getrecursionlimit(),
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGALRM),
            [
                resource.getrlimit(limit)
                for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU)
            ],
        )

    before = state()
    assert play(tokenizer, OneTurn(changes_everything(tmp_path)), limit_s=60.0).reward == 1.0
    assert state() == before
    said = capfd.readouterr().err
    assert "changed the working directory; it was put back" in said
    assert "changed torch's default dtype; it was put back" in said
    assert "changed the limit NOFILE (ulimit); it was put back" in said


def test_a_child_that_the_task_forks_does_not_come_back_as_a_second_generator(tokenizer: Tokenizer) -> None:
    read, write = os.pipe()

    def forks(*_: object) -> float:
        if os.fork() == 0 and os.getpid():
            return 0.5  # the child goes on as if it were the generator
        return 1.0

    assert play(tokenizer, OneTurn(forks)).reward == 1.0
    os.write(write, f"{os.getpid()} ".encode())  # once for every process that comes here
    os.close(write)
    assert os.read(read, 1000).decode().split() == [str(os.getpid())]
    os.close(read)


def test_a_note_or_a_reward_of_a_turn_that_cannot_be_sent_is_the_tasks_error(tokenizer: Tokenizer) -> None:
    async def notes(session: Session) -> float:
        await session.generate(max_tokens=3)
        session.note("loss", torch.tensor(2.0))  # type: ignore[arg-type]
        session.note("half", "\ud800")
        session.reward_turn(torch.tensor(0.5))  # type: ignore[arg-type]
        return 1.0

    made = play(tokenizer, Bare(notes))
    assert made.info == {"loss": 2.0, "half": "?"}
    assert made.turns[0].reward == 0.5

    async def nothing(session: Session) -> float:
        await session.generate(max_tokens=3)
        session.reward_turn(None)  # type: ignore[arg-type]
        return 1.0

    assert "TypeError" in play(tokenizer, Bare(nothing)).reason

    async def of_the_pool(session: Session) -> float:
        session.note("pool/source", "best")
        return 1.0

    assert "is what the experience pool notes" in play(tokenizer, Bare(of_the_pool)).reason


def test_outside_the_main_thread_episodes_run_unwatched(tokenizer: Tokenizer) -> None:
    found: list[Trajectory] = []
    thread = threading.Thread(target=lambda: found.append(play(tokenizer, OneTurn(lambda *_: 1.0), limit_s=9.0)))
    thread.start()
    thread.join(SOON_S)
    assert found[0].reward == 1.0


def test_what_one_held_up_is_not_held_against_the_others(tokenizer: Tokenizer) -> None:
    """Three episodes wait for something short while a fourth holds up everything beyond the limit."""

    async def waits(session: Session) -> float:
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        return 1.0

    async def holds_up(session: Session) -> float:
        await asyncio.sleep(0)
        return loops()

    async def run() -> list[Trajectory]:
        guard = TaskGuard(limit_s=1.5)
        with guard.alarm():
            tasks = [Bare(waits), Bare(holds_up), Bare(waits), Bare(waits)]
            engine = ConstantEngine()
            sessions = [
                EpisodeSession(
                    engine=engine, tokenizer=tokenizer, ticket=TICKET, session_id=n, max_context=200, max_turns=9  # type: ignore[arg-type]
                )
                for n in range(4)
            ]  # fmt: skip
            played = (
                run_episode(task, session, TICKET, timeout_s=60.0, guard=guard)
                for task, session in zip(tasks, sessions, strict=True)
            )
            return list(await asyncio.gather(*played))

    made = run_to_end(run())
    assert [one.ended for one in made] == ["finished", "error", "finished", "finished"], [one.reason for one in made]
