"""Group rewards in a generator: a group's episodes wait for each other, are judged together, and are sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace
from support_models import qwen3_config, write_folder

from async_rl.generator.engine import Completion, Request
from async_rl.generator.episodes import Episodes
from async_rl.generator.session import make_tickets
from async_rl.generator.task_code import TaskGuard
from async_rl.model.tokenizer import Tokenizer
from async_rl.run.evaluate import Limits, sample_episodes
from async_rl.task.protocol import Problem, Sample, Session, Task
from async_rl.task.weigh import Weights
from async_rl.trajectory import Split, Trajectory
from async_rl.trajectory.codec import pack, unpack
from async_rl.wire.messages import ABANDONED, Permit

SOON_S = 20.0
PERMIT = Permit(group=4, problem=0, split="train", samples=(0, 1, 2), seed=0, temperature=1.0, size=3)
Judge = Callable[[Sequence[Sample]], Any]


@dataclass
class CountingEngine:
    """Answers of as many tokens as the seed of the sample says, as soon as `open` lets it."""

    version: int = 3
    max_context: int = 200
    asked: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: Request) -> Completion:
        await self.open.wait()
        self.asked.append(request.seed)
        length = 1 + request.seed % 5
        return Completion(
            tokens=[2 + i for i in range(length)], log_probs=[-0.5] * length, versions=[3] * length, finish="stop"
        )

    def release(self, session: int) -> None:
        self.released.append(session)


class Judged(Task):
    """One turn; the samples of a group are judged by a function."""

    name = "judged"

    def __init__(self, judge: Judge, own: Callable[[int], Any] = lambda sample: 0.25) -> None:
        super().__init__()
        self.judge, self.own = judge, own
        self.seen: list[list[Sample]] = []
        self.played = 0

    def problems(self, split: Split) -> Sequence[Problem]:
        return [Problem(index=0, prompt="abc", data={"answer": "x"})]

    async def rollout(self, problem: Problem, session: Session) -> Any:
        number, self.played = self.played, self.played + 1
        await session.generate(max_tokens=9)
        session.note("number", number)
        session.keep([number])
        return self.own(number)

    async def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> Any:
        self.seen.append(list(samples))
        found = self.judge(samples)
        return await found if isinstance(found, Awaitable) else found


def shorter(samples: Sequence[Sample]) -> list[float]:
    """Tokens less than the longest."""
    longest = max(s.total_tokens for s in samples)
    return [float(longest - s.total_tokens) for s in samples]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model") / "m", qwen3_config()))


@dataclass
class Played:
    """A generator's episodes, and what they sent."""

    task: Judged
    tokenizer: Tokenizer
    weights: Weights = field(default_factory=Weights)
    task_timeout_s: float = 0.0
    sent: list[Trajectory] = field(default_factory=list)
    engine: CountingEngine = field(default_factory=CountingEngine)

    def __post_init__(self) -> None:
        self.episodes = Episodes(
            task=self.task, engine=self.engine, tokenizer=self.tokenizer, generator="g", max_turns=9, timeout_s=SOON_S,
            save_turns_after_s=-1.0, on_finished=self.sent.append, on_change=lambda: None, weights=self.weights,
            guard=TaskGuard(limit_s=self.task_timeout_s),
        )  # type: ignore[arg-type]  # fmt: skip

    async def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + SOON_S
        while not done():
            assert time.monotonic() < deadline, self.sent
            await asyncio.sleep(0)

    async def play(self, permit: Permit = PERMIT, samples: Sequence[int] | None = None) -> list[Trajectory]:
        wanted = permit.samples if samples is None else samples
        self.engine.open.set()
        self.episodes.start(permit, wanted)
        await self.until(lambda: len(self.sent) == len(wanted))
        assert not self.episodes.in_hand
        for trajectory in self.sent:
            assert unpack(pack(trajectory)).check() is None
        return sorted(self.sent, key=lambda t: t.sample)


def test_the_reward_of_the_group_is_added_and_both_are_parts(tokenizer: Tokenizer) -> None:
    task = Judged(shorter)

    async def work() -> list[Trajectory]:
        return await Played(task, tokenizer, Weights(chosen={"group": 2.0})).play()

    made = asyncio.run(work())
    lengths = [t.num_policy_tokens for t in made]
    assert len(set(lengths)) > 1
    assert [t.reward for t in made] == [0.25 + 2.0 * (max(lengths) - n) for n in lengths]
    assert [t.info["reward/group"] for t in made] == [max(lengths) - n for n in lengths]
    assert {t.info["reward/rollout"] for t in made} == {0.25}
    (seen,) = task.seen
    assert [s.number for s in seen] == [0, 1, 2]
    assert [s.total_tokens for s in seen] == lengths
    assert {s.reward for s in seen} == {0.25}
    assert sorted(s.notes["number"] for s in seen) == [0.0, 1.0, 2.0]
    assert all(s.kept == [s.notes["number"]] for s in seen)
    assert all(s.transcript for s in seen)


def test_named_parts_of_both_are_one_reward(tokenizer: Tokenizer) -> None:
    task = Judged(lambda samples: [{"rank": float(s.number)} for s in samples], own=lambda _: {"correct": 1.0})
    weights = Weights(chosen={"rank": 0.5, "correct": 2.0})
    made = asyncio.run(_played(task, tokenizer, weights))
    assert [t.reward for t in made] == [2.0, 2.5, 3.0]
    assert [t.info["reward/rank"] for t in made] == [0.0, 1.0, 2.0]
    wrong = asyncio.run(_played(task, tokenizer, Weights(chosen={"rnk": 1.0})))
    assert {t.ended for t in wrong} == {"error"}
    assert "'rnk', which the reward did not return; did you mean 'rank'" in wrong[0].reason


def test_a_plain_function_judges_too(tokenizer: Tokenizer) -> None:
    class Plain(Judged):
        def reward_group(self, problem: Problem, samples: Sequence[Sample]) -> list[float]:  # type: ignore[override]
            return [1.0] * len(samples)

    assert [t.reward for t in asyncio.run(_played(Plain(shorter), tokenizer))] == [1.25] * 3


async def _played(task: Judged, tokenizer: Tokenizer, weights: Weights | None = None, **more: Any) -> list[Trajectory]:
    return await Played(task, tokenizer, weights or Weights(), **more).play()


def test_failed_samples_are_left_out_and_keep_their_reason(tokenizer: Tokenizer) -> None:
    def own(number: int) -> float:
        if number == 1:
            raise KeyError("gold")
        return 0.5

    task = Judged(lambda samples: [float(len(samples)) for _ in samples], own)
    made = asyncio.run(_played(task, tokenizer))
    assert sorted(t.reward for t in made) == [0.0, 2.5, 2.5]
    (failed,) = [t for t in made if t.failed]
    assert failed.reason.startswith("KeyError: 'gold'")
    assert failed.sample not in [s.number for s in task.seen[0]]


def test_a_group_of_which_all_failed_is_not_judged(tokenizer: Tokenizer) -> None:
    def own(number: int) -> float:
        raise KeyError("gold")

    task = Judged(shorter, own)
    assert {t.ended for t in asyncio.run(_played(task, tokenizer))} == {"error"}
    assert task.seen == []


def raises(samples: Sequence[Sample]) -> list[float]:
    raise LookupError("no judge")


async def never(samples: Sequence[Sample]) -> list[float]:
    await asyncio.Event().wait()
    return []


async def cancels_everything(samples: Sequence[Sample]) -> list[float]:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if "_judge" in repr(task):
            task.cancel()
    await asyncio.sleep(0)
    return [0.0] * len(samples)


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (raises, "LookupError: no judge (test_group_reward.py"),
        (lambda samples: [1.0], "not a list of 3 rewards"),
        (lambda samples: "abc", "not a list of 3 rewards"),
        (lambda samples: 1.0, "not a list of 3 rewards"),
        (lambda samples: [float("nan")] * 3, "the reward is nan"),
        (lambda samples: [1.0, 1.0, {"a": 9e14, "b": 9e14}], "weighed sum"),
        (lambda samples: exit(3), "SystemExit: 3"),
        (never, "it took more than 0.3 s (generator.task_timeout_s) in "),
    ],
)
def test_a_judge_that_fails_ends_the_group_with_the_reason(tokenizer: Tokenizer, judge: Judge, reason: str) -> None:
    made = asyncio.run(_played(Judged(judge), tokenizer, task_timeout_s=0.3))
    assert [(t.ended, t.reward) for t in made] == [("error", 0.0)] * 3
    assert all(t.reason.startswith("the group's reward: ") and reason in t.reason for t in made)


def test_a_judge_that_cancels_what_is_not_its_own_ends_its_group_only(tokenizer: Tokenizer) -> None:
    made = asyncio.run(_played(Judged(cancels_everything), tokenizer))
    assert {t.ended for t in made} == {"error"}
    assert "cancelled asyncio tasks that are not its own" in made[0].reason


# ---------------------------------------------------------------- generators that die, groups that are dropped


def test_a_permit_for_the_rest_of_a_group_plays_all_of_it_and_sends_the_rest(tokenizer: Tokenizer) -> None:
    task = Judged(shorter)

    async def work() -> tuple[list[Trajectory], CountingEngine]:
        played = Played(task, tokenizer)
        return await played.play(replace(PERMIT, samples=(1, 2))), played.engine

    made, engine = asyncio.run(work())
    whole = asyncio.run(_played(Judged(shorter), tokenizer))
    assert [t.sample for t in made] == [1, 2]
    assert [s.number for s in task.seen[0]] == [0, 1, 2]
    assert len(engine.asked) == 3
    assert [(t.reward, t.seed) for t in made] == [(t.reward, t.seed) for t in whole[1:]]


def test_a_permit_that_is_sent_again_starts_nothing(tokenizer: Tokenizer) -> None:
    async def work() -> int:
        played = Played(Judged(shorter), tokenizer)
        played.episodes.start(PERMIT, PERMIT.samples)
        await asyncio.sleep(0)
        played.episodes.start(PERMIT, (2,))
        played.engine.open.set()
        await played.until(lambda: len(played.sent) == 3)
        return played.episodes.started

    assert asyncio.run(work()) == 3


def test_waiting_episodes_are_in_hand_and_their_turns_are_saved(tokenizer: Tokenizer) -> None:
    """Another generator goes on from them without sampling anything anew."""
    halt = asyncio.Event()

    async def wait(samples: Sequence[Sample]) -> list[float]:
        await halt.wait()
        return [0.0] * 3

    async def work() -> None:
        first = Played(Judged(wait), tokenizer)
        first.engine.open.set()
        first.episodes.start(PERMIT, PERMIT.samples)
        await first.until(lambda: first.task.seen)
        assert not first.episodes.running
        assert first.episodes.in_hand == {(4, 0), (4, 1), (4, 2)}
        saved = {t.sample: t for t in first.episodes.take_unsent()}
        assert set(saved) == {0, 1, 2}
        assert first.episodes.take_unsent() == ()
        assert {t.sample for t in first.episodes.finished_turns()} == {0, 1, 2}
        assert await first.episodes.cancel(timeout_s=SOON_S) == 1
        assert first.sent == []
        assert not first.episodes.in_hand

        second = Played(Judged(shorter), tokenizer)
        second.episodes.record_turns([unpack(pack(t)) for t in saved.values()])
        made = await second.play()
        assert second.engine.asked == [], "everything was recalled"
        whole = await _played(Judged(shorter), tokenizer)
        assert [(t.reward, t.tokens.tolist()) for t in made] == [(t.reward, t.tokens.tolist()) for t in whole]

    asyncio.run(work())


def test_turns_that_are_saved_while_a_group_is_judged_change_nothing(tokenizer: Tokenizer) -> None:
    go_on = asyncio.Event()

    async def judge(samples: Sequence[Sample]) -> list[float]:
        await go_on.wait()
        return [1.0] * len(samples)

    async def work() -> list[Trajectory]:
        played = Played(Judged(judge), tokenizer)
        played.engine.open.set()
        played.episodes.start(PERMIT, PERMIT.samples)
        await played.until(lambda: played.task.seen)
        assert len(played.episodes.take_unsent()) == 3
        go_on.set()
        await played.until(lambda: len(played.sent) == 3)
        return played.sent

    assert [t.reward for t in asyncio.run(work())] == [1.25] * 3


@pytest.mark.parametrize("judging", [True, False])
def test_a_dropped_group_is_sent_as_aborted_at_once(tokenizer: Tokenizer, judging: bool) -> None:
    async def work() -> list[Trajectory]:
        played = Played(Judged(never), tokenizer)
        if judging:
            played.engine.open.set()
        played.episodes.start(PERMIT, PERMIT.samples)
        await played.until(lambda: played.task.seen if judging else played.task.played == 3)
        played.episodes.abandon([4])
        played.engine.open.set()
        await played.until(lambda: len(played.sent) == 3)
        assert not played.episodes.in_hand
        assert len(played.task.seen) == judging, "nobody waits for a judge of a group that nobody wants"
        return played.sent

    made = asyncio.run(work())
    if judging:
        assert [(t.ended, t.reason, t.reward) for t in made] == [("aborted", ABANDONED, 0.0)] * 3
        assert all(t.num_policy_tokens for t in made), "what was generated counts"


def test_an_evaluation_judges_the_samples_of_a_problem_together(tokenizer: Tokenizer) -> None:
    task = Judged(shorter)
    permits = [Permit(group=g, problem=0, split="eval", samples=(0, 1), seed=g, temperature=1.0) for g in (0, 1)]
    tickets = [ticket for permit in permits for ticket in make_tickets(permit)]

    async def work() -> list[Trajectory]:
        engine = CountingEngine()
        engine.open.set()
        return await sample_episodes(engine, task, tokenizer, tickets, Limits(reward_weights={"rollout": 4.0}))  # type: ignore[arg-type]

    made = asyncio.run(work())
    assert [(t.group, t.sample) for t in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [len(samples) for samples in task.seen] == [2, 2]
    assert all(t.reward == 1.0 + t.info["reward/group"] for t in made)
