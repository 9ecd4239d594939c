"""Episodes played again from their own turns: honest ones come out the same, others do not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support_verified import Bench

from async_rl.config import Settings
from async_rl.config.schema import structured, with_overrides
from async_rl.generator.replay import Replayer, is_repeatable
from async_rl.run_folder import RunFolder
from async_rl.task import make_task
from async_rl.task.guess import Guess
from async_rl.trainer.replays import Played, Replays
from async_rl.trajectory import Trajectory

REWARDS = """
import random

def plain(completion, answer, problem):
    return float(len(completion)) / 10

async def asks(completion, answer, problem):
    return 1.0

def dice(completion, answer, problem):
    return random.random()"""


def played(model: Path, tmp_path: Path, *words: str, count: int = 6) -> tuple[list[Trajectory], Settings]:
    bench = Bench(model, tmp_path, *words)
    found = bench.play(count) + bench.play(2, split="eval")
    bench.close()
    return found, bench.settings


def data_set(tmp_path: Path, reward: str) -> list[str]:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    rows = (json.dumps({"prompt": f"{number}<", "answer": f"{number}"}) for number in range(10))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    args = {
        "path": tmp_path / "rows.jsonl", "eval_share": 0.2, "as_chat": "false", "max_tokens": 4,
        "reward": f"{tmp_path}/own_rewards.py:{reward}" if reward not in ("exact", "numeric") else reward,
    }  # fmt: skip
    return ["task=dataset", *(f"task.args.{name}={value}" for name, value in args.items())]


@pytest.mark.parametrize("task", ["guess", "exact", "plain"])
def test_honest_episodes_come_out_the_same(tiny_model: Path, tmp_path: Path, task: str) -> None:
    words = ["task.args.max_turns=5"] if task == "guess" else data_set(tmp_path, task)
    trajectories, settings = played(tiny_model, tmp_path, *words, "verify.rewards=auto")
    replayer = Replayer.of(settings)
    for trajectory in trajectories:
        found = replayer.replay(trajectory)
        assert (found.lie, found.played) == ("", True), found
        assert replayer.replay(replace(trajectory, reward=trajectory.reward + 0.5)).lie == "rewards"


def test_what_is_wrong_is_named(tiny_model: Path, tmp_path: Path) -> None:
    trajectories, settings = played(tiny_model, tmp_path, "verify.rewards=auto")
    replayer = Replayer.of(settings)
    one = max(trajectories, key=lambda t: len(t.turns))
    assert len(one.turns) > 1
    prompt = one.tokens.copy()
    prompt[0] += 1
    found = replayer.replay(replace(one, tokens=prompt))
    assert found.lie == "prompts"
    assert found.reason.startswith(f"token 0 of the prompt is {prompt[0]}, the task and the tokenizer prescribe")
    answers = one.tokens.copy()
    between = one.turns[0].start + one.turns[0].length
    answers[between] += 1
    found = replayer.replay(replace(one, tokens=answers))
    assert (found.lie, found.reason) == ("rewards", f"its environment answers otherwise from token {between} on")
    found = replayer.replay(replace(one, reward=7.0))
    assert found.reason == f"its reward is 7, played again it earns {one.reward:g}"


def test_a_task_says_whether_it_is_repeatable(tmp_path: Path) -> None:
    def task(reward: str) -> Any:
        words = ["model.path=x", *data_set(tmp_path, reward)]
        settings = structured(Settings, with_overrides({}, words), where="")
        return make_task(settings.task.name, settings.task.args)

    assert is_repeatable(task("exact"))
    assert is_repeatable(task("plain"))
    assert not is_repeatable(task("asks"))

    class Mine(Guess):
        """May do anything."""

    assert is_repeatable(make_task("guess", {}))
    assert not is_repeatable(Mine(Guess.Settings()))


def ask(replays: Replays, trajectories: list[Trajectory]) -> list[Played]:
    for number, trajectory in enumerate(trajectories):
        assert replays.ask(number, trajectory)
    found = replays.settle(60.0)
    replays.close()
    return found


def folder_of(settings: Settings, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(settings)
    return folder


def test_a_process_of_its_own_plays_them_and_a_second_one_confirms(tiny_model: Path, tmp_path: Path) -> None:
    words = data_set(tmp_path, "plain")
    trajectories, settings = played(tiny_model, tmp_path, *words, "verify.rewards=auto", count=2)
    wrong = replace(trajectories[0], reward=trajectories[0].reward + 1)
    replays = Replays(str(folder_of(settings, tmp_path / "run").path))
    found = ask(replays, [trajectories[0], wrong, trajectories[1]])
    assert [(one.ticket, one.lie, one.whole, one.unlike) for one in found] == [
        (0, "", True, False), (1, "rewards", True, False), (2, "", True, False),
    ]  # fmt: skip


def test_a_reward_that_two_processes_give_differently_is_no_lie(tiny_model: Path, tmp_path: Path) -> None:
    trajectories, settings = played(tiny_model, tmp_path, *data_set(tmp_path, "dice"), "verify.rewards=auto", count=2)
    replays = Replays(str(folder_of(settings, tmp_path / "run").path))
    replays.ask(0, trajectories[0])
    (found,) = replays.settle(60.0)
    assert found.unlike
    assert replays.over
    assert not replays.ask(1, trajectories[1])
    started = time.monotonic()
    replays.close()
    assert time.monotonic() - started < 5
