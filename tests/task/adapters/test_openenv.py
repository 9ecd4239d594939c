"""The task `openenv` at a real server of the package openenv-core, in a process of its own."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support_agents import ScriptedEngine, agents_tokenizer, play, texts_of

from async_rl.errors import UserError
from async_rl.model.tokenizer import Tokenizer
from async_rl.task import Task, make_task

PACKAGES = Path(sys.prefix) / "openenv"
"""of `make openenv`"""
SERVER = Path(__file__).with_name("openenv_server.py")

pytest.importorskip("aiohttp")
pytest.importorskip("uvicorn")


@contextmanager
def served(action: str) -> Iterator[str]:
    """The address of a server."""
    if not PACKAGES.is_dir():
        pytest.skip("make openenv fetches the server")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    command = [sys.executable, str(SERVER), action]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served("said") as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return agents_tokenizer(tmp_path_factory.mktemp("model"))


def made(url: str, **args: Any) -> Task:
    return make_task("openenv", {"url": url, "num_train": 50, "num_eval": 20, **args})


def played(task: Task, tokenizer: Tokenizer, script: Any, **more: Any) -> Any:
    engine = ScriptedEngine(tokenizer, script)
    return asyncio.run(play(engine, tokenizer, task, slots=task.slots, **more))


def test_an_episode_goes_as_the_server_has_it(url: str, tokenizer: Tokenizer) -> None:
    task = made(url, system="Guess.", reset={"most": 8})
    secret = task.problems("train")[0].data["seed"] % 10
    wrong = (secret + 1) % 10
    trajectory = played(task, tokenizer, [f" {wrong} ", str(secret)])
    assert (trajectory.ended, trajectory.reason, trajectory.reward) == ("finished", "", 0.75)
    assert [turn.reward for turn in trajectory.turns] == [-0.25, 1.0]
    assert trajectory.info["steps"] == 2.0
    assert texts_of(trajectory, tokenizer) == [
        "<|im_start|>system\nGuess.<|im_end|>\n<|im_start|>user\na number from 0 to 8<|im_end|>\n"
        f"<|im_start|>assistant\n[ {wrong} <|im_end|>]\n<|im_start|>user\n{'lower' if wrong > secret else 'higher'}"
        f"<|im_end|>\n<|im_start|>assistant\n[{secret}<|im_end|>]"
    ]
    assert trajectory.turns[0].state_key != trajectory.turns[1].state_key


def test_plain_text_all_fields_and_the_last_reward(url: str, tokenizer: Tokenizer) -> None:
    task = made(url, prompt="text", tell="tries", reward="last", max_turns=2)
    secret = task.problems("train")[0].data["seed"] % 10
    wrong = str((secret + 1) % 10)
    trajectory = played(task, tokenizer, [f"{wrong}\n", f"{wrong}\n"])
    assert (trajectory.ended, trajectory.reward) == ("turn_limit", -0.25)
    assert texts_of(trajectory, tokenizer) == [f"0>[{wrong}\n]1>[{wrong}\n]"]


def test_an_error_of_the_environment_is_a_failed_episode(url: str, tokenizer: Tokenizer) -> None:
    trajectory = played(made(url), tokenizer, ["what?"])
    assert trajectory.ended == "error"
    assert "EXECUTION_ERROR" in trajectory.reason


def test_more_episodes_than_the_server_takes_wait_for_a_place(url: str, tokenizer: Tokenizer) -> None:
    from async_rl.generator.places import Slots

    task = made(url, sessions=2)
    secret = task.problems("train")[0].data["seed"] % 10
    engine = ScriptedEngine(tokenizer, lambda history: str(secret))
    shared = Slots(dict(task.slots))

    async def several() -> Any:
        return await asyncio.gather(
            *(play(engine, tokenizer, task, sample=i, slots=shared) for i in range(6)),
        )

    assert [trajectory.reward for trajectory in asyncio.run(several())] == [1.0] * 6


def test_seeds_are_disjoint_and_the_same_everywhere(url: str) -> None:
    first, second = made(url), made(url)
    seeds = {split: [p.data["seed"] for p in first.problems(split)] for split in ("train", "eval")}
    assert not set(seeds["train"]) & set(seeds["eval"])
    assert seeds["eval"] == [p.data["seed"] for p in second.problems("eval")]


def test_an_action_of_several_fields_needs_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openenv_acting.py").write_text(
        "def act(text):\n    row, column = text.split()\n    return {'row': int(row), 'column': int(column)}\n"
        "def told(observation):\n    return observation['hint'].upper()\n"
    )
    monkeypatch.chdir(tmp_path)
    with served("pair") as url:
        with pytest.raises(UserError, match="the fields row, column; name the one that holds the policy's text"):
            made(url)
        with pytest.raises(UserError, match="'rows' is no field of an action; did you mean 'row'"):
            made(url, action="rows")
        with pytest.raises(UserError, match="'hin' is no field of an observation; did you mean 'hint'"):
            made(url, action="openenv_acting.py:act", tell="hin")
        task = made(url, action="openenv_acting.py:act", tell="openenv_acting.py:told")
    assert task._act("3 4") == {"row": 3, "column": 4}  # type: ignore[attr-defined]
    assert task.told({"hint": "a", "tries": 1}) == "A"  # type: ignore[attr-defined]


def test_where_no_server_answers_is_said() -> None:
    with pytest.raises(UserError, match=r"no environment server answers at http://127.0.0.1:1 "):
        made("http://127.0.0.1:1")
    with pytest.raises(UserError, match="write http://HOST:PORT"):
        made("127.0.0.1:8000")
