"""Loads the loss functions of verl and TRL from `.venv/foreign`, where `make foreign` puts the packages alone.

What these packages import and a loss does not use (ray, tensordict, datasets and so on) is replaced by empty classes,
so these tests run in a process of their own: only where they are named (`make foreign`, `pytest tests/foreign`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / ".venv" / "foreign"
REPLACED = (
    "ray", "tensordict", "datasets", "hydra", "torchdata", "codetiming", "pylatexenc", "peft", "deepspeed", "vllm",
    "wandb", "pandas", "transfer_queue", "cachetools", "pyarrow", "orjson",
)  # fmt: skip
"""top-level modules; only those that are not installed are replaced"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if any("foreign" in str(argument) for argument in config.args) else True


class Empty(ModuleType):
    """A module in which every name is an empty class."""

    __version__ = "0.0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
        setattr(self, name, made)
        return made


class Replacer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `REPLACED` where nobody else does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in REPLACED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@pytest.fixture(scope="session")
def foreign() -> Iterator[None]:
    """The folder on the path of imports."""
    replacer = Replacer()
    sys.path.append(str(FOLDER))
    sys.meta_path.append(replacer)
    yield
    sys.meta_path.remove(replacer)
    sys.path.remove(str(FOLDER))


def load(name: str) -> ModuleType:
    """Import a module of a package in the folder; skips the test where the package is absent."""
    if not (FOLDER / name.partition(".")[0]).is_dir():
        pytest.skip(f"{name.partition('.')[0]} is not in .venv/foreign; run `make foreign`")
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def verl(foreign: None) -> ModuleType:
    return load("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="session")
def trl(foreign: None) -> ModuleType:
    return load("trl.trainer.grpo_trainer")


@pytest.fixture(scope="session")
def module_of(foreign: None) -> Callable[[str], ModuleType]:
    """Any module of these packages, by its name."""
    return load
