"""Files of the user's own: found in the order that is promised, recorded, compared."""

import json
import shutil
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from async_rl.config import Settings
from async_rl.config.load import make_settings
from async_rl.config.sources import changed_sources, read_sources, sources_of, write_sources
from async_rl.errors import UserError

TASK = "from async_rl import Problem, Task\nclass Mine(Task):\n    def problems(self, split): return []\n"
MODEL = {"model": {"path": "none"}, "recipe": "grpo"}
REWARD = "def score(completion, answer): return 0.0\n"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A folder of a config, the working directory, and a folder on the path."""
    found = {name: tmp_path / name for name in ("config", "here", "path")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.chdir(found["here"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(found["path"])])
    return found


def settings_in(folder: Path, task: str = "task_of_mine.py:Mine", **args: object) -> Settings:
    return make_settings({**MODEL, "task": {"name": task, "args": args}}, folder=folder).settings


def test_a_file_is_looked_for_beside_the_config_then_here_then_on_the_path(places: dict[str, Path]) -> None:
    for name, folder in places.items():
        (folder / "task_of_mine.py").write_text(f"{TASK}# {name}\n")
    for name in ("config", "here", "path"):
        for written in ("task_of_mine.py:Mine", "task_of_mine:Mine"):
            (source,) = sources_of(settings_in(places["config"], written))
            file = places[name] / "task_of_mine.py"
            assert (source.setting, source.file) == ("task.name", str(file))
            assert source.digest == blake2b(file.read_bytes(), digest_size=16).hexdigest()
        file.unlink()
    for written in ("task_of_mine.py:Mine", "task_of_mine:Mine"):
        with pytest.raises(UserError, match=r"task.name 'task_of_mine.*there is no (file|module)"):
            sources_of(settings_in(places["config"], written))


def test_every_kind_of_code_is_found_and_what_is_built_in_is_not(places: dict[str, Path]) -> None:
    folder = places["config"]
    for name in ("reward", "tool", "mine"):
        (folder / f"{name}_of_mine.py").write_text(REWARD)
    (folder / "recipe.yaml").write_text("name: grpo\n")
    args = {
        "reward": "reward_of_mine.py:score",
        "tool": ["tool_of_mine.py:score", "mine_of_mine:score"],
        "path": "a.py",
    }
    values = {**MODEL, "task": {"name": "tools", "args": args}, "recipe": {"name": "recipe.yaml"}}
    settings = make_settings(values, folder=folder).settings
    assert [(source.setting, Path(source.file).name) for source in sources_of(settings)] == [
        ("task.args.reward", "reward_of_mine.py"),
        ("task.args.tool", "tool_of_mine.py"),
        ("task.args.tool", "mine_of_mine.py"),
        ("recipe.name", "recipe.yaml"),
    ]
    assert sources_of(make_settings({**MODEL, "task": "guess"}).settings) == ()


def test_a_rehearsed_tasks_code_is_found(places: dict[str, Path]) -> None:
    (places["here"] / "reward_of_mine.py").write_text(REWARD)
    inner = {"name": "dataset", "args": {"reward": "reward_of_mine.py:score"}}
    (source,) = sources_of(settings_in(places["here"], "rehearsed", **inner))
    assert source.setting == "task.args.args.reward"


def test_what_changed_is_told_and_where_it_lies_does_not_count(places: dict[str, Path], tmp_path: Path) -> None:
    file = places["here"] / "task_of_mine.py"
    file.write_text(TASK)
    settings = settings_in(places["here"])
    recorded = sources_of(settings)
    write_sources(tmp_path / "sources.json", recorded)
    assert read_sources(tmp_path / "sources.json") == recorded
    assert read_sources(tmp_path / "none.json") == ()
    assert not changed_sources(recorded, sources_of(settings))
    shutil.move(file, places["path"])
    assert not changed_sources(recorded, sources_of(settings))
    (places["path"] / "task_of_mine.py").write_text(TASK + "# changed\n")
    assert changed_sources(recorded, sources_of(settings)) == recorded
    assert changed_sources(recorded, ()) == recorded


def test_a_module_is_found_without_being_imported(places: dict[str, Path]) -> None:
    (places["here"] / "loud_of_mine.py").write_text("raise RuntimeError('imported')\n")
    (source,) = sources_of(settings_in(places["here"], "loud_of_mine:Mine"))
    assert source.file == str(places["here"] / "loud_of_mine.py")
    assert sources_of(settings_in(places["here"], "itertools:count")) == (), "what stands in no file has no digest"


def test_doctor_shows_what_it_found(places: dict[str, Path]) -> None:
    (places["config"] / "task_of_mine.py").write_text(TASK)
    (places["config"] / "mine.yaml").write_text("model: {path: none}\ntask: task_of_mine.py:Mine\nrecipe: grpo\n")
    command = [sys.executable, "-m", "async_rl", "doctor", str(places["config"] / "mine.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=places["here"])
    (said,) = [found["said"] for found in json.loads(done.stdout) if found["check"] == "own code"]
    assert str(places["config"] / "task_of_mine.py") in said
