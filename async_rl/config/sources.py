"""The files of the user's own code that a run's settings name: where each lies, and what it held.

A run keeps them in `sources.json`; a generator that joins it compares its own with them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from async_rl.config.imports import DATA_FILES, NAMING_SETTINGS, find_source, is_import
from async_rl.config.settings import Settings
from async_rl.errors import UserError

REHEARSED = "rehearsed"
"""the name of the task that wraps another one: its `args` hold the name and the args of that one"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file. Example: `Source(setting="task.name", name="task.py:Game", file="/home/me/task.py", digest="6b1f")`."""

    setting: str
    """that names it"""
    name: str
    """as the setting has it"""
    file: str
    """absolute path, on the host that found it"""
    digest: str
    """blake2b of the file's bytes, 16 bytes in hex. Of a module's file alone, not of what that imports"""

    def __str__(self) -> str:
        return f"{self.setting} '{self.name}' is {self.file} (blake2b {self.digest[:12]})"


def sources_of(settings: Settings) -> tuple[Source, ...]:
    """The file of each object of the user's own that `settings` name. Imports nothing but the packages around a module.

    Raises UserError for a file or module that is not there, with the setting."""
    found = []
    for setting, name in _named(settings):
        file = Path(name).expanduser() if name.endswith(DATA_FILES) else find_source(name, where=f"{setting} '{name}'")
        if file is not None:  # a module of Python itself has none
            found.append(Source(setting=setting, name=name, file=str(file.resolve()), digest=digest_of(file, setting)))
    return tuple(found)


def digest_of(file: Path, setting: str) -> str:
    """blake2b of the bytes of `file`, which `setting` names. Raises UserError."""
    try:
        return blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise UserError(f"{setting}: {file} cannot be read ({error.strerror})") from None


def _named(settings: Settings) -> Iterator[tuple[str, str]]:
    """(setting, name) of every object of the user's own."""
    values: dict[str, Any] = {"task": {"name": settings.task.name, "args": settings.task.args}}
    values["recipe"] = settings.recipe
    for path in _paths(settings.task.name):
        value: Any = values
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and (is_import(name) or name.endswith(DATA_FILES)):
                yield path, name


def _paths(task: str) -> Sequence[str]:
    if task != REHEARSED:
        return NAMING_SETTINGS
    return [path if path.startswith("recipe") else path.replace("task", "task.args", 1) for path in NAMING_SETTINGS]


# ------------------------------------------------------------------------------------------------ of a run


def write_sources(path: Path, sources: Sequence[Source]) -> None:
    """Record what a new run uses. `path`: its `sources.json`, which is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps([asdict(source) for source in sources], indent=1) + "\n")
    os.replace(partial, path)


def read_sources(path: Path) -> tuple[Source, ...]:
    """What was recorded; empty for a run of a version that recorded nothing. Raises UserError."""
    if not path.is_file():
        return ()
    try:
        return tuple(Source(**row) for row in json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove it, and what the run uses is recorded anew") from None


def changed_sources(recorded: Sequence[Source], found: Sequence[Source]) -> tuple[Source, ...]:
    """Those of `recorded` whose setting has other contents, or none, in `found`. Where a file lies does not count."""
    now = {(source.setting, Path(source.file).name): source.digest for source in found}
    return tuple(source for source in recorded if now.get((source.setting, Path(source.file).name)) != source.digest)
