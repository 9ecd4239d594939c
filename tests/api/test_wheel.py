"""The wheel: it builds from the checkout, and what it installs needs nothing of the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from async_rl.version import __version__

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="pip install hatchling")


def call(*words: object, cwd: Path) -> str:
    # without what the caller's environment, or a bench that another test imports, puts before the installed packages
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without network, with the build backend that is installed here."""
    out = tmp_path_factory.mktemp("wheel")
    words = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", out, ROOT)
    call(sys.executable, *words, cwd=out)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_what_the_program_reads(wheel: Path) -> None:
    assert wheel.name == f"async_rl-{__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"async_rl/py.typed", "async_rl_kernels/py.typed", "async_rl/observe/page/report.html"} <= inside
    wanted = [path for path in (ROOT / "async_rl").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = [name for path in wanted if (name := path.relative_to(ROOT).as_posix()) not in inside]
    assert not missing
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.split("/")[0] in ("tests", "bench", "docs", "configs")]


def test_the_quickstart_runs_from_an_empty_folder_with_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    environment, home = tmp_path / "venv", tmp_path / "home"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python, command = environment / "bin" / "python", environment / "bin" / "async-rl"
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    call(sys.executable, *install, cwd=tmp_path)
    # the dependencies are those of this environment; its own link to the checkout (a .pth file) is not followed
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home.mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.yaml", home)

    where = "import async_rl, async_rl_kernels; print(async_rl.__file__, async_rl_kernels.__file__)"
    assert all(Path(path).is_relative_to(environment) for path in call(python, "-c", where, cwd=home).split())
    assert call(command, "--version", cwd=home).split()[-1] == __version__
    assert "vcpo" in call(command, "recipes", cwd=home)
    small = "hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=64, max_steps=2"
    call(python, "-c", f"import async_rl as ar; ar.init_model('models/quickstart', {small})", cwd=home)
    few = ("trainer.steps=2", "batch.groups_per_step=2", "batch.group_size=4", "evaluation.problems=4")
    call(command, "run", "quickstart.yaml", "--run-dir", "runs/first", *few, cwd=home)
    assert json.loads((home / "runs" / "first" / "summary.json").read_text())["steps"] == 2
    call(command, "report", "runs/first", cwd=home)
    assert (home / "runs" / "first" / "report.html").stat().st_size > 10_000
