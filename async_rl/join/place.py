"""Where the run is that is to be joined: named by its endpoint, or found in its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import RunFailed, UserError
from async_rl.launch.external import AWAITED
from async_rl.run_folder import RunFolder, read_rows
from async_rl.settings import Settings, WireSettings
from async_rl.wire.channel import ipc_endpoint
from async_rl.wire.endpoint import as_reached_from_here, is_tcp
from async_rl.wire.host import this_host
from async_rl.wire.keys import Keys

POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Example: `Place(endpoint="tcp://10.0.0.3:5555", keys=Keys(Path("keys")), timeout_s=120.0)`."""

    endpoint: str
    keys: Keys | None
    timeout_s: float
    """longest wait for the buffer"""


def find_place(endpoint: str | None, run: Path | None, keys: Path | None) -> Place:
    """From what the user named. Waits for a run that is being started. Raises UserError, RunFailed."""
    if endpoint is None and run is None:
        raise UserError("name the run to join: --run RUN for one on this host, or --connect tcp://HOST:PORT --keys DIR")
    chosen = Keys(keys.absolute()) if keys is not None else None
    timeout_s = WireSettings().timeout_s
    if run is not None:
        folder = RunFolder(run)
        if not folder.config.is_file():
            raise UserError(f"{folder.path} is not a run folder: there is no {folder.config.name} in it")
        wire = folder.settings().wire
        timeout_s = wire.timeout_s
        endpoint = endpoint or endpoint_of(folder, timeout_s)
        if chosen is None and wire.keys and is_tcp(endpoint):
            chosen = Keys(Path(wire.keys).absolute())
    assert endpoint is not None
    if is_tcp(endpoint) and chosen is None:
        raise UserError(f"{endpoint} is served with keys only; name their folder with --keys DIR")
    if not is_tcp(endpoint) and keys is not None:
        raise UserError(f"--keys does nothing with {endpoint}: keys are for tcp; leave it out")
    return Place(endpoint=as_reached_from_here(endpoint), keys=chosen, timeout_s=timeout_s)


def endpoint_of(folder: RunFolder, timeout_s: float) -> str:
    """Where the buffer of the run in this folder listens. Raises UserError when nobody runs it."""
    deadline = time.monotonic() + timeout_s
    while True:
        if folder.summary.exists():
            raise UserError(f"{folder.path}: this run is finished; there is nothing to join")
        if not launched(folder):
            raise UserError(f"{folder.path}: nobody runs it now; `async-rl run --resume {folder.path}` goes on with it")
        found = ""
        for row in read_rows(folder.events):
            if row["event"] == "started" and row["process"] == "buffer":
                found = ""  # of a launch before
            elif row["event"] == "buffer_ready":
                found = row["endpoint"]
        if found:
            # a folder that is reached by another path here has its socket at that path, too
            return ipc_endpoint(folder.path) if found.endswith("/buffer.sock") else found
        if time.monotonic() > deadline:
            raise RunFailed(f"waited {timeout_s:g} s (wire.timeout_s) for the buffer of {folder.path} to start")
        time.sleep(POLL_S)


def awaited_trainer(folder: RunFolder, settings: Settings) -> Mapping[str, Any]:
    """What the run says of the trainer that it waits for; waits for a run that is being started. Raises UserError
    when it waits for none."""
    if settings.trainer.start != "external":
        raise UserError(
            f"{folder.path}: this run starts its trainer itself; with trainer.start=external it waits for one"
        )
    deadline = time.monotonic() + settings.wire.timeout_s
    while True:
        if folder.summary.exists():
            raise UserError(f"{folder.path}: this run is finished; there is nothing to train")
        wanted: Mapping[str, Any] = {}
        for row in read_rows(folder.events):
            if row["event"] == "started" and row["process"] == "buffer":
                wanted = {}  # of a launch before
            elif row["event"] == AWAITED:
                wanted = row
        elsewhere = bool(wanted) and wanted["host"] != this_host()
        if not elsewhere and not launched(folder):
            raise UserError(f"{folder.path}: nobody runs it now; `async-rl run --resume {folder.path}` goes on with it")
        if wanted:
            return wanted
        if time.monotonic() > deadline:
            waited = f"waited {settings.wire.timeout_s:g} s (wire.timeout_s)"
            raise RunFailed(f"{waited} for the run in {folder.path} to want a trainer")
        time.sleep(POLL_S)


def launched(folder: RunFolder) -> bool:
    """Whether the launcher that took the run's lock last is alive."""
    return launched_by(folder) > 0


def launched_by(folder: RunFolder) -> int:
    """Process number of that launcher; 0 when it is not alive, or not on this host."""
    try:
        owner = folder.lock.read_text().strip()
    except OSError:
        return 0
    return int(owner) if owner.isdecimal() and Path(f"/proc/{owner}").exists() else 0
