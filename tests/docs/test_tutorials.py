"""The programs and configs that the tutorials print are what they say: taken out of the pages, loaded and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_rl.config import load_settings
from async_rl.objective.library import load_recipe

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial"


def write_files(page: str, folder: Path) -> None:
    """Every code block of a page that has a file's name as its title."""
    text = (TUTORIAL / page).read_text()
    for name, code in re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', text, flags=re.DOTALL):
        (folder / name).write_text(code)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a language without a title, each with its output, if the page has one, behind a line ---."""
    text = (TUTORIAL / page).read_text()
    found = re.findall(rf"```{language}\n(.*?)```(?:\n\n```\n(.*?)```)?", text, flags=re.DOTALL)
    return [f"{code}---\n{output}" if output else code for code, output in found]


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    (folder / "shown.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "shown.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_plays_the_episode_that_is_printed(tmp_path: Path) -> None:
    write_files("own_environment.md", tmp_path)
    code, _, output = blocks("own_environment.md", "python")[-1].partition("---\n")
    assert run(code, tmp_path) == output


def test_the_environments_config_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files("own_environment.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_settings(Path("lights.yaml"), []).task.name.endswith("lights.py:Lights")


def test_the_algorithms_are_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files("own_algorithm.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_recipe({"name": "mine.yaml"}).trust.rule == "cispo"
    assert load_recipe({"name": "mine.py:fading"}).name.endswith("mine.py:fading")


def test_the_reward_pays_what_its_docstring_says(tmp_path: Path) -> None:
    write_files("own_data.md", tmp_path)
    code = (
        "from async_rl import Problem\n"
        "from my_rewards import short_and_right\n"
        "problem = Problem(index=0, prompt='')\n"
        "answers = ['so it is 30.', 'so it is 31', '', 'x' * 290 + ' 30']\n"
        "print([round(short_and_right(said, '30', problem), 3) for said in answers])\n"
    )
    assert run(code, tmp_path) == "[1.0, 0.0, 0.0, 0.907]\n"


def test_the_data_sets_config_is_read(tmp_path: Path) -> None:
    config = tmp_path / "my_config.yaml"
    config.write_text(blocks("own_data.md", "yaml")[0])
    assert load_settings(config, []).task.args["reward"] == "numeric"
