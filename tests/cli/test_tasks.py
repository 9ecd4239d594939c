"""`async-rl tasks`: the list, and one task with its settings, problems and an episode."""

import re
from pathlib import Path

import pytest

from async_rl.cli.main import main
from async_rl.task.adapters import ADAPTERS
from async_rl.task.build import TASKS

MINE = """
from dataclasses import dataclass
from async_rl import Problem, Task

class Echo(Task):
    '''Say the number.'''
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        words: int = 3

    def problems(self, split):
        return [Problem(index=i, prompt=f"say {i}:", data={"answer": str(i)}) for i in range(self.settings.words)]

    async def rollout(self, problem, session):
        session.note("asked", 1.0)
        text = await session.generate(max_tokens=8)
        session.append("!")
        return {"right": float(text == problem.data["answer"]), "short": 0.5}

class Raises(Echo):
    async def rollout(self, problem, session):
        raise KeyError("gold")

class Judged(Echo):
    def reward_group(self, problem, samples):
        return [s.reward - s.parts["shrt"] for s in samples] if self.settings.words == 1 else [0.25] * len(samples)

class ByAgent(Echo):
    async def rollout(self, problem, session):
        session.openai()
"""


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["tasks", *words])
    found = capsys.readouterr()
    assert end.value.code == 0, found.err
    return found.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["tasks", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo_task.py").write_text(MINE)
    return tmp_path


def test_the_list_has_every_task_with_its_size_and_every_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = printed(capsys)
    for name in [*TASKS, *ADAPTERS]:
        assert (f"\n  {name} " in said) == (name != "rehearsed")
    assert re.search(r"guess +256 / 128 ", said)
    assert re.search(r"dataset +your data ", said)
    monkeypatch.setattr("async_rl.task.adapters.registry.find_spec", lambda name: None)
    said = printed(capsys)
    for adapter in ADAPTERS.values():
        assert f"({adapter.package}: pip install '{adapter.package}{adapter.versions}')" in said


def test_a_task_is_shown_with_settings_problems_and_an_episode(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "calculator", "digits=2", "task.args.num_train=50")
    assert "task.args.digits = 2  [digits]" in said
    assert "problems: 50 to train on, 256 held out" in said
    assert said.count("\nproblem ") == 3
    assert "a demonstration of the task speaks" in said
    assert "reward: 1.0" in said


def test_ones_own_task_is_shown_by_its_name_and_by_a_config(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    said = printed(capsys, "echo_task.py:Echo", "words=2")
    assert "Say the number." in said
    assert "problems: 2 to train on" in said
    assert "the problem's own answer speaks" in said
    assert '<policy> 0\n    <environment> !\n    reward: {"right": 1.0, "short": 0.5}\n    asked: 1.0' in said
    (folder / "mine.yaml").write_text("task: {name: 'echo_task.py:Echo', args: {words: 5}}\nrecipe: grpo\n")
    assert "problems: 5 to train on" in printed(capsys, "mine.yaml")
    assert "problems: 4 to train on" in printed(capsys, "mine.yaml", "words=4")


def test_what_an_episode_raises_is_shown(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    raised = printed(capsys, "echo_task.py:Raises")
    assert "reward: none: it raised KeyError: 'gold' (echo_task.py:22 rollout)" in raised
    assert printed(capsys, "echo_task.py:Judged").count("reward: 0.25") == 4
    assert "none: it raised KeyError: 'shrt' (echo_task.py:" in printed(capsys, "echo_task.py:Judged", "words=1")
    assert "played by an agent through an endpoint" in printed(capsys, "echo_task.py:ByAgent")


def test_a_wrong_name_or_setting_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "did you mean 'calculator'" in refused(capsys, "calculater")
    assert "did you mean 'task.args.digits'" in refused(capsys, "calculator", "digit=2")
    assert "no such file" in refused(capsys, "none.yaml")
