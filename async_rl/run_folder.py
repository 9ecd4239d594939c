"""The folder of a run: its files, how they are written and read, and the lock that one launch at a time holds."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time as clock
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from async_rl.config import Settings
from async_rl.config.renamed import renamed
from async_rl.config.schema import load_yaml, structured, to_yaml
from async_rl.errors import RunFailed, UserError
from async_rl.events import Event, EventRow, RunRolledBack, read_event_rows

LOCK_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """the resolved settings"""
        return self.path / "config.yaml"

    @property
    def demonstrations(self) -> Path:
        """Those of pool.file as tokens (buffer/demonstrations.py), if there are any."""
        return self.path / "demonstrations.bin"

    @property
    def metrics(self) -> Path:
        """one JSON row a step"""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """one JSON row an event (events.py)"""
        return self.path / "events.jsonl"

    @property
    def weights(self) -> Path:
        """hash of the weights by version: one JSON row a step for small models, else one a checkpoint"""
        return self.path / "weights.jsonl"

    @property
    def store(self) -> Path:
        """trajectories and batches"""
        return self.path / "trajectories.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """there when the run is done"""
        return self.path / "summary.json"

    @property
    def rollback(self) -> Path:
        """that the run went back to an earlier checkpoint (`Rollback`)"""
        return self.path / "rollback.json"

    @property
    def sources(self) -> Path:
        """the user's own files that the run was started with (config/sources.py)"""
        return self.path / "sources.json"

    @property
    def problem_sources(self) -> Path:
        """where each training problem comes from, if the sampler chooses among sources (task/problem_fields.py)"""
        return self.path / "problem_sources.json"

    @property
    def live(self) -> Path:
        """how things stand now, written anew every second while the run goes on"""
        return self.path / "live.json"

    @property
    def lock(self) -> Path:
        """held while any process of a launch lives (`take_lock`)"""
        return self.path / "run.lock"

    @property
    def logs(self) -> Path:
        """standard output and error of each process"""
        return self.path / "logs"

    @property
    def ending(self) -> Path:
        """there while the launcher, told to end by a signal, waits for a last checkpoint"""
        return self.path / "ending"

    def failure(self, process: str) -> Path:
        """why a process ended badly"""
        return self.logs / f"{process}.failure.json"

    def stacks(self, process: str) -> Path:
        """what a process did when it was ended because it was frozen: the stacks of its threads, appended"""
        return self.logs / f"{process}.stacks"

    @property
    def inputs(self) -> Path:
        """what the run was begun with besides its settings (run/inputs.py)"""
        return self.path / "inputs.json"

    def step_mark(self, process: str) -> Path:
        """which episode's code a generator runs now (generator/step_mark.py)"""
        return self.logs / f"{process}.step"

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that has begun. Raises UserError when `path` holds none."""
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"{path} is not a run folder: there is no {folder.config.name} in it")
        return folder

    def create(self, settings: Settings) -> None:
        """Make the folder of a new run and write its settings. Raises UserError when it is not new."""
        with self.created(settings):
            pass

    @contextmanager
    def created(self, settings: Settings) -> Iterator[None]:
        """`create`; the block writes what belongs to it. Where any of it cannot be written, nothing stays behind."""
        try:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path} exists already; choose another --run-dir or remove it")
            for folder in (self.path, self.logs, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.config, to_yaml(settings))
            yield
        except OSError as error:
            shutil.rmtree(self.path, ignore_errors=True)  # it was empty, or not there
            why = error.strerror or str(error)
            raise UserError(f"{self.path} cannot be written: {why}; choose another --run-dir") from None

    def settings(self) -> Settings:
        """The settings the run was started with."""
        return structured(Settings, self.values(), where="")

    def values(self) -> dict[str, Any]:
        """Those settings as they are written down; where the run is older than a setting, what it did then."""
        values, _ = renamed(load_yaml(self.config))
        if isinstance(evaluation := values.get("evaluation"), dict):
            evaluation.setdefault("choice", "first")
        return values

    def record(self, event: Event, *, time: float | None = None) -> None:
        """Append an event to events.jsonl. `time`: when it happened, seconds since the epoch; None: now. Raises
        RunFailed."""
        append_row(self.events, event.row(clock.time() if time is None else time))

    def read_events(self) -> list[EventRow]:
        """The events so far, in the order they were written."""
        return read_event_rows(read_rows(self.events))


# ------------------------------------------------------------------------------------------------ whole files


def replace_text(path: Path, text: Iterable[str], *, durable: bool = False) -> None:
    """Write a file so that a reader, or a death half-way, finds the old text or the new one. `text`: whole, or
    piece by piece. `durable`: it survives a power loss from here on."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.writelines([text] if isinstance(text, str) else text)
        if durable:
            to_disk(partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would be in the way
        raise
    if durable:
        to_disk(path.parent)


def to_disk(path: Path) -> None:
    """What was written to a file, or which names are in a folder, survives a power loss from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ JSON rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON row in one write, so that rows of several processes never mix. Raises RunFailed."""
    line = (json.dumps(row, allow_nan=True) + "\n").encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, line)
            if written < len(line):  # a second write raises the reason: the disk is full
                os.write(fd, line[written:])
        finally:
            os.close(fd)
    except OSError as error:
        remedy = "make room on its disk"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit of open files (ulimit -n)"
        raise RunFailed(f"{path} cannot be written ({error.strerror}); {remedy} and resume the run") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Lines that cannot be read are left out: one that a full disk tore, and a last one
    that is still being written."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (row := _object(line)) is not None:
                yield row


@dataclass(slots=True)
class RowTail:
    """The rows of a JSONL file that others append to, and that a resumed launch replaces by a shorter one."""

    path: Path
    _offset: int = field(default=0, init=False)
    """bytes read"""
    _file: tuple[int, int] = field(default=(0, 0), init=False)
    """device and inode of the file that was read"""

    def new(self) -> list[dict[str, Any]]:
        """Rows since the last call."""
        return self.poll()[0]

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        """Rows since the last call, and whether the file began anew (then these are all its rows). Lines that cannot
        be read are left out; one that is still being written comes later."""
        try:
            with self.path.open("rb") as file:
                anew = self._begins_anew(os.fstat(file.fileno()))
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            anew, self._offset, self._file = self._offset > 0, 0, (0, 0)
            return [], anew
        self._offset += len(whole) + len(newline)
        return [row for line in whole.splitlines() if (row := _object(line)) is not None], anew

    def skip(self, to: int | None = None) -> None:
        """Leave out the rows that are there now, or those up to byte `to`, where a row begins."""
        with suppress(FileNotFoundError):
            stat = self.path.stat()
            self._file, self._offset = (stat.st_dev, stat.st_ino), stat.st_size if to is None else to

    def unread(self) -> int:
        """Bytes that the next call reads."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return 0
        same = (stat.st_dev, stat.st_ino) == self._file and stat.st_size >= self._offset
        return stat.st_size - self._offset if same else stat.st_size

    def _begins_anew(self, stat: os.stat_result) -> bool:
        anew = (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._offset
        if anew:
            self._offset, self._file = 0, (stat.st_dev, stat.st_ino)
        return anew


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


# ------------------------------------------------------------------------------------------------ the lock


def take_lock(path: Path, seconds: float) -> int:
    """The descriptor of the run's lock, which one launch at a time holds.

    The lock belongs to an open file that the launcher's children inherit, so it is free when the last process of a
    launch is gone, however they ended: a resumed run never meets processes of the launch before. Waits up to
    `seconds` for processes whose launcher is dead; raises UserError when they stay, or at once when that launcher is
    alive.
    """
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
            clock.sleep(LOCK_POLL_S)
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


# ------------------------------------------------------------------------------------------------ the rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """That a run went back to an earlier checkpoint: `rollback.json`, written once, before the processes end, so
    that the next launch knows where to begin whenever any of them is killed.

    Version numbers go on. The step that raised the alarm is done, but its result is given up before anybody has seen
    it; from then on version `at`, one after that step, is the weights of version `to`. So no number ever means two
    sets of weights, and staleness keeps counting. The buffer refuses what the given-up versions have sampled and was
    not trained yet; what was trained stays in the record.
    """

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
    """seconds since the epoch"""

    @property
    def given_up(self) -> int:
        """Number of steps that were given up."""
        return self.at - self.to

    def source(self, version: int, *, there: bool) -> int:
        """Version of the checkpoint from which training goes on at `version`. `there`: `version` has a checkpoint."""
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
        """Example: `at step 40 to the checkpoint of version 30, 11 steps given up, learning rate x 0.5: alarm ess`."""
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
    try:
        replace_text(folder.rollback, json.dumps(asdict(rollback), indent=1), durable=True)
    except OSError as error:
        raise RunFailed(
            f"{folder.rollback} cannot be written ({error.strerror}); make room on its disk and resume the run"
        ) from None
