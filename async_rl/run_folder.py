"""Where a run keeps its things."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time as clock
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from async_rl.config import Settings
from async_rl.config.schema import load_yaml, structured, to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.events import Event, EventRow, RunRolledBack, read_event_rows

# -------------------- follow
# A JSONL file that others append to and a resumed launch may cut: its new rows, whatever happens to it.


@dataclass(slots=True)
class Follower:
    path: Path
    _offset: int = field(default=0, init=False)
    """bytes read"""
    _file: tuple[int, int] = field(default=(0, 0), init=False)
    """device and inode: a resumed launch puts a new file in place"""

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole rows since the last call, and whether the file began anew (then these are all its rows). Lines
        that cannot be read are left out; one that is still being written comes later."""
        try:
            with self.path.open("rb") as file:
                stat = self.path.stat()
                again = (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset
                if again:
                    self._offset, self._file = 0, (stat.st_dev, stat.st_ino)
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            again, self._offset, self._file = self._offset > 0, 0, (0, 0)
            return [], again
        self._offset += len(whole) + len(newline)
        return [row for line in whole.splitlines() if (row := _object(line)) is not None], again


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


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

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that has begun. Raises UserError when `path` holds none."""
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"{path} is not a run folder: there is no {folder.config.name} in it")
        return folder

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

    def record(self, event: Event, *, time: float | None = None) -> None:
        """Append an event to events.jsonl. `time`: when it happened, seconds since the epoch; None: now. Raises
        RunFailed."""
        append_row(self.events, event.row(clock.time() if time is None else time))

    def read_events(self) -> list[EventRow]:
        """The events so far, in the order they were written."""
        return read_event_rows(read_rows(self.events))


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


# -------------------- run lock
# One launcher at a time works on a run folder.
#
# The lock belongs to an open file that the launcher's children inherit, so it is free when the last process
# of a launch is gone, however they ended: a resumed run never meets the last words of the one before.

POLL_S = 0.05


def take_lock(path: Path, seconds: float) -> int:
    """The descriptor of the held lock, to be passed to children. Waits up to `seconds` for processes whose
    launcher is dead; raises UserError when they stay, or at once when that launcher is alive."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    deadline = clock.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            alive = owner.isdecimal() and Path(f"/proc/{owner}").exists()
            if alive or clock.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(_taken(path.parent, owner, alive, seconds)) from None
            clock.sleep(POLL_S)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _taken(run: Path, owner: str, alive: bool, seconds: float) -> str:
    if alive:
        return f"{run}: a launcher (process {owner}) is still running it; end that one first"
    return (
        f"{run}: its launcher is dead, but {seconds:g} s later a process it started still lives (frozen?); "
        f"`pgrep -af {run}` shows it, end it and resume again"
    )


# -------------------- rollback
# That a run went back to an earlier checkpoint, once: `rollback.json`, the one truth of it.
#
# Version numbers go on. The step that raised the alarm is done, its result is given up before anybody has seen it,
# and from then on version `at`, one behind that step, is the weights of version `to`. So no number ever means two
# sets of weights, and staleness counts on. What the given-up versions have sampled and was not trained yet is refused
# by the buffer; what was trained stays in the record. Written before the processes end, so whenever any of them is
# killed, the next launch knows where to begin.


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Times in seconds since the epoch."""

    at: int
    """version that the weights gone back to have from then on; step at - 1 was the last that was given up"""
    to: int
    """version of the checkpoint they come from; 0: the initial model"""
    since: int
    """first sign of the collapse, a step"""
    signal: str
    """which alarm"""
    reason: str
    """in words and numbers"""
    lr_scale: float
    """factor on the learning rate from then on"""
    progress: Mapping[str, Any]
    """what the trainer's loop remembers"""
    time: float

    @property
    def given_up(self) -> int:
        """Steps."""
        return self.at - self.to

    def source(self, version: int, *, there: bool) -> int:
        """Version of the checkpoint from which training goes on at `version`; `there`: it has a checkpoint."""
        return self.to if version == self.at and not there else version

    def event(self) -> RunRolledBack:
        return RunRolledBack(
            version=self.at,
            to=self.to,
            since=self.since,
            lr_scale=self.lr_scale,
            reason=self.reason,
            text=self.describe(),
        )

    def describe(self) -> str:
        begin = f"the checkpoint of version {self.to}" if self.to else "the initial model"
        return (
            f"at step {self.at - 1} to {begin}, {self.given_up} steps given up, learning rate x {self.lr_scale:g}: "
            f"{self.reason}"
        )


def read_rollback(folder: RunFolder) -> Rollback | None:
    """None: the run has not gone back. Raises RunFailed when the file is not one of ours."""
    try:
        values = json.loads(folder.rollback.read_text())
        return Rollback(**{field.name: values[field.name] for field in fields(Rollback)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{folder.rollback} cannot be read ({error}); restore it from a copy of the run") from None


def write_rollback(folder: RunFolder, rollback: Rollback) -> None:
    """On the disk when this returns. Raises RunFailed."""
    partial = folder.rollback.with_name(f".{folder.rollback.name}.partial")
    try:
        partial.write_text(json.dumps(asdict(rollback), indent=1))
        to_disk(partial)
        os.replace(partial, folder.rollback)
        to_disk(folder.path)
    except OSError as error:
        raise RunFailed(
            f"{folder.rollback} cannot be written ({error.strerror}); make room on its disk and resume the run"
        ) from None
