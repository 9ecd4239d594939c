"""What generators on other machines get of the user's files: a copy that works where the files themselves are not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support_run import quick_settings

from async_rl.cluster import shipping
from async_rl.cluster.shipping import ship
from async_rl.config import Settings
from async_rl.config.schema import structured, with_overrides
from async_rl.config.sources import changed_sources, sources_of
from async_rl.errors import UserError
from async_rl.run.join import local_settings

TASK = """
from other import words
from async_rl.task import Problem, Task

class Mine(Task):
    pass

def reward(completion, answer, problem):
    return float(words())
"""


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with code in two files, data and a model."""
    folder = tmp_path / "project"
    (folder / "tasks" / ".venv").mkdir(parents=True)
    (folder / "tasks" / "mine.py").write_text(TASK)
    (folder / "tasks" / "other.py").write_text("def words(): return 1\n")
    (folder / "tasks" / ".venv" / "not_mine.py").write_text("")
    (folder / "train.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    (folder / "prices").mkdir()
    (folder / "prices" / "a.txt").write_text("1")
    os.symlink(tiny_model, folder / "model")
    monkeypatch.chdir(folder)
    return folder


def dataset(*words: str) -> Settings:
    base = quick_settings(Path("model"), "cluster.engine=ray")
    args = ("task=dataset", "task.args.path=train.jsonl", "task.args.reward=tasks/mine.py:reward")
    return structured(Settings, with_overrides(asdict(base), [*args, *words]), where="")


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def joined(settings: Settings, words: list[str], place: Path) -> Settings:
    """As a generator that starts in `place` has them."""
    told = asdict(settings)
    return local_settings(told, words, "", place)


def test_the_copy_mirrors_the_working_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, there = dataset("cluster.ship=[prices]"), tmp_path / "there"
    found = ship(settings, there)
    assert files(there) >= {"tasks/mine.py", "tasks/other.py", "train.jsonl", "prices/a.txt", "model/config.json"}
    assert not any(".venv" in name for name in files(there))
    assert (found.words, found.notes) == ([], [])
    recorded = sources_of(settings)
    project.rename(tmp_path / "gone")
    monkeypatch.chdir(there)
    assert changed_sources(recorded, sources_of(joined(settings, [], there))) == ()
    script = (
        "from async_rl.config.imports import load_object as l\nprint(l('tasks/mine.py:reward', where='x')('', '', 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=there, check=False)
    assert done.stdout == "1.0\n", done.stderr


def test_what_has_an_absolute_path_gets_a_word(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "mine.py").write_text(TASK)
    (away / "other.py").write_text("def words(): return 2\n")
    (away / "rows.jsonl").write_text("{}\n")
    words = (
        f"task.args.path={away}/rows.jsonl",
        f"task.args.reward={away}/mine.py:reward",
        f"model.path={project}/model",
    )
    settings, there = dataset(*words), tmp_path / "there"
    found = ship(settings, there)
    recorded = sources_of(settings)
    away.rename(tmp_path / "gone")
    monkeypatch.chdir(there)
    here = joined(settings, found.words_at(str(there)), there)
    assert Path(here.task.args["path"]).read_text() == "{}\n"
    assert Path(here.task.args["path"]).is_relative_to(there)
    assert Path(here.model.path).is_relative_to(there)
    assert changed_sources(recorded, sources_of(here)) == ()
    assert {"mine.py", "other.py"} <= {Path(name).name for name in files(there / "outside")}


def test_large_models_and_data_stay_where_they_are(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "LARGEST_MODEL", 10)
    monkeypatch.setattr(shipping, "LARGEST_DATA", 10)
    found = ship(dataset(), tmp_path / "there")
    assert found.words == [f"model.path={project}/model", f"task.args.path={project}/train.jsonl"]
    assert len(found.notes) == 2
    assert all("of their node" in note for note in found.notes)
    assert files(tmp_path / "there") == {"tasks/mine.py", "tasks/other.py"}


@pytest.mark.parametrize(
    ("words", "limits", "said"),
    [
        (("cluster.ship=[nowhere]",), {}, "cluster.ship names 'nowhere', which is no file or folder below"),
        (("cluster.ship=['..']",), {}, "cluster.ship names '..'"),
        ((), {"LARGEST": 1}, "Ray carries 0 MB at most"),
        ((), {"MOST_CODE": 1}, "put the task into a folder of its own"),
        (("task.args.reward=tasks/gone.py:reward",), {}, "there is no file tasks/gone.py"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    words: tuple[str, ...], limits: dict[str, int], said: str, project: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in limits.items():
        monkeypatch.setattr(shipping, name, value)
    with pytest.raises(UserError) as refused:
        ship(dataset(*words), tmp_path / "there")
    assert said in str(refused.value)
