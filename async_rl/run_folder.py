"""Where a run keeps its things."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config import load_yaml, structured, to_yaml
from async_rl.errors import UserError
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
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists already; choose another --run-dir or remove it")
        try:
            for folder in (self.path, self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            self.config.write_text(to_yaml(settings))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; choose another --run-dir") from None

    def settings(self) -> Settings:
        """The settings the run was started with."""
        return structured(Settings, load_yaml(self.config), where="")

    def event(self, kind: str, **detail: Any) -> None:
        append_row(self.events, {"event": kind, **detail})


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a death half-way, finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON row in one write, so that rows of several processes never mix."""
    line = json.dumps(row, allow_nan=True) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSONL file; a last row that is still being written is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
