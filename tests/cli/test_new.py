"""`async-rl new`: the project it writes passes its own test, learns, and needs nothing of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from async_rl.cli.main import main
from async_rl.cli.new import TEMPLATE, next_steps


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written into an empty folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["new", "demo"])
    assert end.value.code == 0
    return tmp_path / "demo"


def run_in(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_project_is_whole_and_says_what_comes_next(project: Path) -> None:
    assert {path.name for path in project.iterdir()} == {
        "config.yaml", "rows.yaml", "my_task.py", "my_reward.py", "data.jsonl", "README.md", "test_project.py",
    }  # fmt: skip
    assert len((project / "data.jsonl").read_text().splitlines()) == 10
    said = next_steps(Path("demo"))
    assert "cd demo" in said
    assert not [path for path in project.iterdir() if "{name}" in path.read_text()]
    readme = (project / "README.md").read_text()
    for line in said.splitlines()[2:]:
        assert line.partition("#")[0].strip() in readme, "README.md names the same commands"


def test_its_test_passes_with_pytest_and_without(project: Path) -> None:
    assert "all tests passed" in run_in(project, "test_project.py")
    assert "4 passed" in run_in(project, "-m", "pytest", "-p", "no:cacheprovider", "test_project.py")


def test_it_is_written_as_the_house_writes(project: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("needs ruff")
    for words in (
        ("check", "--isolated", "--line-length=120"),
        ("format", "--isolated", "--check", "--line-length=120"),
    ):
        done = subprocess.run([ruff, *words, "."], cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_it_makes_its_model_and_runs_outside_the_repository(project: Path) -> None:
    run_in(project, "-m", "async_rl", "init-model", "model", "--task", "my_task.py:Rhyme", "--until", "0.3")
    words = ("trainer.steps=3", "evaluation.every=0", "evaluation.samples=4")
    said = run_in(project, "-m", "async_rl", "run", "config.yaml", "--run-dir", "runs/first", *words)
    assert "recipe grpo" in said
    assert json.loads((project / "runs" / "first" / "summary.json").read_text())["steps"] == 3
    assert ", form 0" in said
    for config in ("config.yaml", "rows.yaml"):
        tried = run_in(project, "-m", "async_rl", "try", config, "--episodes", "3")
        assert "episode 3 of 3" in tried
        assert ", rhyme 0" in tried
        assert "parts, unweighted: form 0." in tried


def test_a_folder_that_holds_something_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "data.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as end:
        main(["new", "demo"])
    assert end.value.code == 2
    assert "demo exists already; remove it or choose another folder" in capsys.readouterr().err
    assert (project / "data.jsonl").read_text() == "precious"


def test_the_template_belongs_to_the_package() -> None:
    assert TEMPLATE.is_dir()
    assert not list(TEMPLATE.glob("*.py")), "they are no part of this package"
