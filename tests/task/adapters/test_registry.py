"""The adapters by name: what each needs is what pyproject.toml installs for it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from async_rl.task.adapters import ADAPTERS

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_command_installs_what_the_extra_of_the_adapter_does(name: str) -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    (needed,) = extras[name.replace("_", "-")]
    assert ADAPTERS[name].install == f"pip install '{needed}'"
    assert needed.startswith(ADAPTERS[name].package)
