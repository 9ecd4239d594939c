"""A resume finds out what has changed since the run began: rows, own code, tokenizer, problems; and it works from any
directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support_command import write_config

from async_rl.events import RunResumed
from async_rl.run_folder import RunFolder

REWARD = "def judge(completion, answer, problem):\n    return float(len(completion) % 2)\n"
TASK = """
from dataclasses import dataclass
from async_rl import Problem, Task
from words import WORDS

class Say(Task):
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        pass

    def problems(self, split):
        return [Problem(index=i, prompt=f"{word}<") for i, word in enumerate(WORDS)]

    async def rollout(self, problem, session):
        return float(len(await session.generate(max_tokens=3)) % 2)
"""


def command(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "async_rl", "run", *map(str, words)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def write_rows(folder: Path, count: int, prefix: str = "") -> None:
    rows = (json.dumps({"prompt": f"{i}<", "answer": f"{prefix}{i}"}) for i in range(count))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path) -> Path:
    """A finished run of two steps, made with relative paths in a folder of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    (folder / "judge_reward.py").write_text(REWARD)
    write_rows(folder, 12)
    args = ("path=rows.jsonl", "eval_share=0.3", "as_chat=false", "max_tokens=3", "reward=judge_reward.py:judge")
    config = write_config(
        folder, tiny_model, "task=dataset", *(f"task.args.{word}" for word in args),
        "model.path=model", "trainer.steps=2", "optimizer.schedule=constant",
    )  # fmt: skip
    done = command(folder, config.name, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    return folder


def change_rows(folder: Path) -> None:
    write_rows(folder, 12, prefix="x")


def append_a_row(folder: Path) -> None:
    write_rows(folder, 13)


def change_reward(folder: Path) -> None:
    (folder / "judge_reward.py").write_text(REWARD + "# another\n")


def change_tokenizer(folder: Path) -> None:
    file = folder / "model" / "generation_config.json"
    known = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    file.write_text(json.dumps({"eos_token_id": sorted(known.values())[:3]}))


def change_one_answer(folder: Path) -> None:
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace('"answer": "6"', '"answer": "7"'))


def take_a_row_away(folder: Path) -> None:
    write_rows(folder, 11)


def add_a_field(folder: Path) -> None:
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace("}", ', "more": 1}', 1))


CHANGES: dict[Callable[[Path], None], str] = {
    change_rows: "data",
    change_one_answer: "data",
    append_a_row: "data",
    take_a_row_away: "data",
    add_a_field: "data",
    change_reward: "code",
    change_tokenizer: "tokenizer",
}


FIRST = {
    change_rows: "the first that differs: rows.jsonl, line 1\n",
    change_one_answer: "the first that differs: rows.jsonl, line 7\n",
    append_a_row: "the first that differs: rows.jsonl, line 13, which is new\n",
    take_a_row_away: "the first that differs: row 12 is there no more\n",
    add_a_field: "prompts and answers as they were: other fields differ, or how the files are written\n",
}


@pytest.mark.parametrize(
    "changes",
    [
        (change_one_answer, change_reward, change_tokenizer),
        pytest.param((change_rows, append_a_row, take_a_row_away, add_a_field), marks=pytest.mark.nightly),
    ],
)
def test_each_change_is_refused_by_name_and_goes_on_when_accepted(
    changes: tuple[Callable[[Path], None], ...], project: Path
) -> None:
    run = RunFolder(project / "run")
    for change in changes:
        kind = CHANGES[change]
        kept = project.parent / "kept"
        shutil.copytree(project, kept)
        change(project)
        refused = command(project, "--resume", "run", "trainer.steps=4")
        assert refused.returncode == 2
        assert "what the run was begun with has changed:" in refused.stderr
        assert f"  {kind}: " in refused.stderr
        assert f"--accept-changed {kind}\n" in refused.stderr
        assert FIRST.get(change, "") in refused.stderr
        shutil.rmtree(project)
        shutil.move(kept, project)

    idle = command(project, "--resume", "run", "trainer.steps=4", "--accept-changed", "data")
    assert (idle.returncode, "nothing of that has changed since the run began" in idle.stderr) == (2, True)
    wrong = command(project, "--resume", "run", "trainer.steps=4", "--accept-changed", "rows")
    assert (wrong.returncode, "choose of data, code, tokenizer, problems" in wrong.stderr) == (2, True)

    append_a_row(project)
    change_reward(project)
    # from another directory: what is relative begins where the run was made
    done = command(project.parent, "--resume", "project/run", "trainer.steps=4", "--accept-changed", "data,code")
    assert done.returncode == 0, done.stderr
    assert "accepted: data has changed since the run began" in done.stdout
    resumed = [row.event for row in run.read_events() if isinstance(row.event, RunResumed)]
    assert {"(data)", "(code)"} <= set(resumed[-1].changed)
    again = command(project, "--resume", "run", "trainer.steps=5")  # what was accepted is what there is now
    assert again.returncode == 0, again.stderr


def test_problems_of_an_own_task_are_compared_whatever_they_are_made_of(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "say_task.py").write_text(TASK)
    (tmp_path / "words.py").write_text("WORDS = ['1', '2', '3', '4']\n")
    config = write_config(tmp_path, tiny_model, "task=say_task.py:Say", "trainer.steps=2")
    assert command(tmp_path, config.name, "--run-dir", "run").returncode == 0
    (tmp_path / "words.py").write_text("WORDS = ['1', '2', '4', '3']\n")
    refused = command(tmp_path, "--resume", "run", "trainer.steps=3")
    assert refused.returncode == 2
    assert "  problems: 4 training problems (" in refused.stderr
    assert os.path.exists(tmp_path / "run")
