"""The adapters by the name that `task.name` gives them, known without importing anything of theirs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from async_rl.errors import UserError
from async_rl.task.protocol import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapter: where its class is, and which package it needs."""

    place: str
    """module:class"""
    module: str
    """what the package is imported as"""
    package: str
    """its name on PyPI"""
    versions: str
    """that the adapter works with, as pip writes them"""
    summary: str
    """one line"""

    @property
    def installed(self) -> bool:
        """Whether the package is there; a folder of its name in the working directory is none."""
        found = find_spec(self.module)
        return found is not None and found.origin is not None

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install '{self.package}{self.versions}'"

    @property
    def version(self) -> str:
        """Of the installed package; empty without it."""
        try:
            return version(self.package) if self.installed else ""
        except PackageNotFoundError:
            return ""


ADAPTERS: dict[str, Adapter] = {
    "reasoning_gym": Adapter(
        place="async_rl.task.adapters.reasoning_gym:ReasoningGym",
        module="reasoning_gym",
        package="reasoning-gym",
        versions=">=0.1.25",
        summary="a generator of reasoning-gym: made-up problems with their own scoring, one turn",
    ),
    "gymnasium": Adapter(
        place="async_rl.task.adapters.gymnasium:Gymnasium",
        module="gymnasium",
        package="gymnasium",
        versions=">=1.1",
        summary="an environment of gymnasium with a finite number of actions, told and played in text",
    ),
    "textarena": Adapter(
        place="async_rl.task.adapters.textarena:TextArena",
        module="textarena",
        package="textarena",
        versions=">=0.7.4",
        summary="a game of textarena for one or more players; the policy plays one seat or all (self-play)",
    ),
    "openenv": Adapter(
        place="async_rl.task.adapters.openenv:OpenEnv",
        module="aiohttp",
        package="aiohttp",
        versions=">=3.10",
        summary="an environment server that speaks OpenEnv's protocol and runs elsewhere",
    ),
    "verifiers": Adapter(
        place="async_rl.task.adapters.verifiers:Verifiers",
        module="verifiers",
        package="verifiers",
        versions=">=0.2,<0.4",
        summary="an environment of verifiers: its own rollout, tools and rubric, one turn or several",
    ),
}


def adapter_class(name: str) -> type[Task]:
    """The task class of adapter `name`; its package need not be there."""
    module, _, found = ADAPTERS[name].place.partition(":")
    made = getattr(importlib.import_module(module), found)
    assert issubclass(made, Task)
    return made


def require_package(name: str) -> None:
    """Raises UserError when the package of adapter `name` is not installed."""
    adapter = ADAPTERS[name]
    if not adapter.installed:
        raise UserError(
            f"task.name={name} needs the package {adapter.package}, which is not installed; {adapter.install}"
        )
