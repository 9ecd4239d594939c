"""Where a run keeps its things."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from async_rl.config import load_yaml, structured, to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.settings import Settings


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """one JSON row a step"""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """one JSON row an event: starts, ends, failures, waits"""
        return self.path / "events.jsonl"

    @property
    def weights(self) -> Path:
        """hash of the weights by version: one JSON row a step for small models, else one a checkpoint"""
        return self.path / "weights.jsonl"

    @property
    def store(self) -> Path:
        return self.path / "trajectories.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def rollback(self) -> Path:
        """that the run went back to an earlier checkpoint; see rollback.py"""
        return self.path / "rollback.json"

    @property
    def live(self) -> Path:
        """how things stand now, written anew every second while the run goes on"""
        return self.path / "live.json"

    @property
    def lock(self) -> Path:
        """held while any process of a launch lives"""
        return self.path / "run.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def failure(self, process: str) -> Path:
        """why a process ended badly"""
        return self.logs / f"{process}.failure.json"

    def create(self, settings: Settings) -> None:
        """Make the folder and write the resolved settings. Raises UserError when it is not new."""
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path} exists already; choose another --run-dir or remove it")
            for folder in (self.path, self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.config, to_yaml(settings))
        except OSError as error:
            shutil.rmtree(self.path, ignore_errors=True)  # it was empty, or not there
            raise UserError(f"{self.path} cannot be written: {error.strerror}; choose another --run-dir") from None

    def settings(self) -> Settings:
        """The settings the run was started with."""
        return structured(Settings, load_yaml(self.config), where="")

    def event(self, kind: str, /, **detail: Any) -> None:
        append_row(self.events, {"event": kind, **detail})


def replace_text(path: Path, text: Iterable[str]) -> None:
    """Write a file so that a reader, or a death half-way, finds the old text or the new one. `text`: whole, or
    piece by piece."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(partial, path)


def to_disk(path: Path) -> None:
    """What was written to a file, or which names are in a folder, survives a power loss from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON row in one write, so that rows of several processes never mix. Raises RunFailed."""
    line = (json.dumps(row, allow_nan=True) + "\n").encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, line)
            if written < len(line):  # the rest tells why: the disk is full
                os.write(fd, line[written:])
        finally:
            os.close(fd)
    except OSError as error:
        raise RunFailed(
            f"{path} cannot be written ({error.strerror}); make room on its disk and resume the run"
        ) from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSONL file. A last row that is still being written is left out, and one that a full
    disk tore."""
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from _whole_rows(file)


def _whole_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.endswith(b"\n"):
            with suppress(ValueError):
                yield json.loads(line)


@dataclass(slots=True)
class RowTail:
    """The rows of a growing JSONL file that have not been read yet."""

    path: Path
    _offset: int = field(default=0, init=False)
    """bytes read"""

    def skip(self) -> None:
        """What is there now is not of interest."""
        self._offset = self.path.stat().st_size if self.path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Whole rows since the last call; one that is still being written comes with a later call."""
        if not self.path.exists() or self.path.stat().st_size == self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return list(_whole_rows((whole + newline).splitlines(keepends=True)))
