"""What a run needs of the machine, measured and judged: software, cores, GPUs, memory, sockets, shared memory, disk.

`read_*` measures; `judge_*` makes a `Finding` of what was measured and is pure; `check_*` does both."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from async_rl.config import Settings
from async_rl.finding import Finding, error, ok, warning
from async_rl.run.memory import Estimate, megabytes
from async_rl.weights.shared_memory import shared_folder
from async_rl.wire.channel import Dealer, Router, ipc_endpoint
from async_rl.wire.endpoint import LONGEST_IPC_PATH, ZmqLibrary, library
from async_rl.wire.keys import Keys, make_keys
from async_rl.wire.messages import Query, Snapshot

OLDEST_PYTHON = (3, 11)
OLDEST_SQLITE = (3, 35)
"""UPSERT with several clauses, write-ahead logs without known faults"""
REQUIRED = {
    "torch": "2.11", "numpy": "2.0", "omegaconf": "2.4", "msgspec": "0.19", "safetensors": "0.5", "tokenizers": "0.21",
}  # fmt: skip
"""package -> oldest version"""
OPTIONAL = {
    "vllm": "an engine for GPUs",
    "flash-attn": "faster attention on GPUs",
    "transformers": "models the built-in decoder does not define",
    "math-verify": "the reward 'math'",
    "pyarrow": "Parquet files",
}
"""package -> what it would be for"""
MOST_SHARE = 0.9
"""of the memory that is there; the system and the caches of files need the rest"""
TRAJECTORY_BYTES, TOKEN_BYTES = 400, 9
"""in the store"""
ROUND_TRIP_S = 5.0
"""time a message may take between two sockets"""
SLOW_FSYNC_S = 0.02
SLOW_DISK_BYTES_S = 50 << 20
"""bytes a second"""
PROBE_BYTES = 32 << 20
"""written to measure a disk"""
PROBE_FSYNCS = 10


# ------------------------------------------------------------------------------------------------ software


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    python: str
    sqlite: str
    packages: dict[str, str]
    """installed ones of REQUIRED and OPTIONAL -> version"""
    zmq: ZmqLibrary


def read_software() -> Software:
    packages = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Software(python=platform.python_version(), sqlite=sqlite3.sqlite_version, packages=packages, zmq=library())


def judge_software(found: Software) -> Iterator[Finding]:
    """Python, SQLite, the packages a run needs and those it can use, ZeroMQ's abilities."""
    if numbers(found.python) < OLDEST_PYTHON:
        yield error("python", found.python, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    else:
        yield ok("python", found.python)
    if numbers(found.sqlite) < OLDEST_SQLITE:
        yield error("sqlite", found.sqlite, f"use a Python with SQLite {'.'.join(map(str, OLDEST_SQLITE))} or newer")
    else:
        yield ok("sqlite", found.sqlite)
    for name, oldest in REQUIRED.items():
        version = found.packages.get(name)
        if version is None:
            yield error(name, "not installed", f"pip install '{name}>={oldest}'")
        elif numbers(version) < numbers(oldest):
            yield error(name, version, f"pip install '{name}>={oldest}'")
        else:
            yield ok(name, version)
    yield judge_zmq(found.zmq)
    there = [f"{name} {found.packages[name]}" for name in OPTIONAL if name in found.packages]
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in found.packages]
    yield ok("optional", f"installed: {', '.join(there) or 'none'}; not: {', '.join(missing) or 'none'}")


def judge_zmq(found: ZmqLibrary) -> Finding:
    said = f"pyzmq {found.pyzmq}, libzmq {found.libzmq}"
    if not found.ipc:
        return error("zeromq", f"{said}, without Unix sockets", "install pyzmq's wheel from PyPI")
    if not found.curve:
        said += ", without CURVE: no TCP, so no generators on other hosts"
        return warning("zeromq", said, "install pyzmq's wheel from PyPI")
    return ok("zeromq", f"{said}, ipc and curve")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    found: list[int] = []
    for part in version.split("."):
        digits = "".join(c for c in part.split("+")[0] if c.isdigit())
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ memory


def disk_bytes(settings: Settings, found: Estimate) -> int:
    """Bytes that a run may write, with sequences half as long as the context: trajectories, and the kept checkpoints of
    weights and two moments (one more while it is written)."""
    length = found.context // 2 or 1024
    trajectories = settings.batch.groups_per_step * settings.batch.group_size
    steps = settings.trainer.steps
    if settings.buffer.keep_steps:
        steps = min(steps, settings.buffer.keep_steps + settings.checkpoint.every * settings.checkpoint.keep)
    store = steps * trajectories * (TRAJECTORY_BYTES + TOKEN_BYTES * length)
    if settings.buffer.max_store_mb:
        store = min(store, settings.buffer.max_store_mb << 20)
    return store + (settings.checkpoint.keep + 1) * 12 * found.parameters


def judge_memory(found: Estimate, device: str, free_bytes: int) -> Finding:
    """The estimate `found` against what is free on one device."""
    check = "memory" if device == "cpu" else f"memory {device}"
    largest = sorted((part for part in found.parts if part.device == device), key=lambda part: -part.bytes)[:3]
    shown = ", ".join(f"{part.name} {megabytes(part.bytes)}" for part in largest)
    needed = found.on(device)
    said = f"about {megabytes(needed)} of {megabytes(free_bytes)} available ({shown})"
    remedy = f"lower {found.what_to_lower(device)}; `async-rl config` shows every part"
    if needed > free_bytes:
        return error(check, said, remedy)
    if needed > MOST_SHARE * free_bytes:
        return warning(check, said, remedy)
    return ok(check, said)


# ------------------------------------------------------------------------------------------------ cores


def judge_cores(cores: int, settings: Settings | None) -> Finding:
    """Processes times threads against cores. The buffer needs little of one and is not counted; threads that are left
    to the run count as one, since more are only taken where cores are free."""
    if settings is None:
        return ok("cores", f"{cores}")
    trainer, generator = settings.trainer, settings.generator
    planned, words, lower = 0, [], []
    if not trainer.device.startswith("cuda"):
        planned += trainer.ranks * max(1, trainer.threads)
        ranks = f"{trainer.ranks} ranks x " if trainer.ranks > 1 else ""
        words.append(f"trainer {ranks}{trainer.threads or 1}")
        lower += ["trainer.ranks"] * (trainer.ranks > 1) + ["trainer.threads"] * (trainer.threads > 1)
    if not generator.device.startswith("cuda"):
        planned += generator.count * max(1, generator.threads)
        words.append(f"{generator.count} generators x {generator.threads or 1} threads")
        lower += ["generator.count"] + ["generator.threads"] * (generator.threads > 1)
    if not words:
        return ok("cores", f"{cores}; trainer and generators work on GPUs")
    said = f"{cores} cores; {' + '.join(words)} = {planned} at work, buffer beside them"
    if planned > cores:
        remedy = f"lower {' or '.join(lower)}: threads that wait for a core hold up all others of their process"
        return warning("cores", said, remedy)
    return ok("cores", said)


# ------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    cuda: str
    """version torch was built for; empty: built without"""
    names: tuple[str, ...]
    free_bytes: tuple[int, ...]
    driver: bool
    """nvidia-smi is there"""


def read_gpus() -> Gpus:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Gpus(
        cuda=torch.version.cuda or "",
        names=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        free_bytes=tuple(torch.cuda.mem_get_info(i)[0] for i in range(count)),
        driver=shutil.which("nvidia-smi") is not None,
    )


def judge_gpus(found: Gpus, settings: Settings | None) -> Finding:
    wanted = [] if settings is None else [
        name for name in ("generator", "trainer") if getattr(settings, name).device.startswith("cuda")
    ]  # fmt: skip
    if wanted and not found.names:
        why = "torch is built without CUDA" if not found.cuda else "torch finds no GPU"
        return error(
            "gpu", f"{' and '.join(f'{name}.device' for name in wanted)} ask for one, but {why}",
            "set the device to cpu, or install torch for CUDA and a driver",
        )  # fmt: skip
    if found.driver and not found.names:
        return warning(
            "gpu", "nvidia-smi is there, but torch finds no GPU", "install torch for CUDA, or look at `nvidia-smi`"
        )
    if not found.names:
        return ok("gpu", "none; a run on CPU needs none")
    each = zip(found.names, found.free_bytes, strict=True)
    return ok("gpu", ", ".join(f"{name} ({megabytes(free)} free)" for name, free in each))


# ---------------------------------------------------------------------------------------------- sockets


def round_trip(endpoint: str, keys: Keys | None = None) -> float:
    """Seconds of one question and answer between two sockets of this process. Raises UserError, WireTimeout."""
    with Router(endpoint, keys=keys) as router, Dealer(router.endpoint, "doctor", keys=keys) as dealer:
        started = time.perf_counter()
        dealer.send(Query())
        received = router.receive(ROUND_TRIP_S)
        if received is None:
            raise TimeoutError(f"no message came through within {ROUND_TRIP_S:g} s")
        router.send(received[0], Snapshot())
        dealer.receive(ROUND_TRIP_S, "an answer")
        return time.perf_counter() - started


def judge_socket(check: str, trip: Callable[[], float], remedy: str) -> Finding:
    """`trip`: a round trip, or what it raises."""
    try:
        seconds = trip()
    except Exception as failure:  # whatever it is, the run's sockets would meet it
        said, _, better = str(failure).partition("; ")
        return error(check, said, better or remedy)
    return ok(check, f"round trip {seconds * 1000:.1f} ms")


def check_ipc() -> Finding:
    """A message through a Unix socket in the temporary folder: the run's folder does not exist yet."""
    with tempfile.TemporaryDirectory() as made:
        return judge_socket(
            "unix socket", lambda: round_trip(ipc_endpoint(Path(made))),
            "the temporary folder must be on a local file system; set TMPDIR",
        )  # fmt: skip


def check_tcp() -> Finding:
    """A message through the loopback, with keys made for it."""
    with tempfile.TemporaryDirectory() as made:
        return judge_socket(
            "tcp loopback", lambda: round_trip("tcp://127.0.0.1:*", make_keys(Path(made) / "keys")),
            "only needed for generators on other hosts: is the loopback up, is a firewall in the way?",
        )  # fmt: skip


def judge_socket_path(run_folder: Path) -> Finding:
    """Unix sockets have short names; a longer one goes to the temporary folder."""
    length = len(os.fsencode(run_folder.resolve() / "buffer.sock"))
    if length > LONGEST_IPC_PATH:
        return warning(
            "socket path",
            f"{length} bytes, {LONGEST_IPC_PATH} are possible: the socket will lie in the temporary folder",
            "choose a shorter --run-dir if that folder is cleaned while the run goes on",
        )  # fmt: skip
    return ok("socket path", f"{length} of {LONGEST_IPC_PATH} bytes")


# ---------------------------------------------------------------------------------------- shared memory


def judge_shared_memory(free_bytes: int | None, model_bytes: int | None) -> Finding:
    """`free_bytes`: of /dev/shm, None where there is none; `model_bytes`: of one version as published."""
    if free_bytes is None:
        return warning(
            "shared memory", "/dev/shm is not there or not writable: weights go through a file in the run's folder",
            "mount a tmpfs at /dev/shm for large models",
        )  # fmt: skip
    if model_bytes is None:
        return ok("shared memory", f"{megabytes(free_bytes)} free in /dev/shm")
    said = f"{megabytes(free_bytes)} free in /dev/shm, two versions of the model take {megabytes(2 * model_bytes)}"
    if free_bytes < 2 * model_bytes:
        return error("shared memory", said, "give the container more (docker run --shm-size), or remove old segments")
    return ok("shared memory", said)


def read_shared_memory() -> int | None:
    shared = shared_folder()
    return shutil.disk_usage(shared).free if shared is not None else None


# ------------------------------------------------------------------------------------------------- disk


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskProbe:
    """What was measured of a disk."""

    folder: Path
    free_bytes: int
    fsync_s: float
    """one small write made durable, median"""
    bytes_s: float
    """of a large file, fsync included"""


def read_disk(folder: Path) -> DiskProbe:
    """Measure by writing into `folder`, or the nearest one above it that is there; nothing stays. Raises OSError."""
    while not folder.is_dir():
        folder = folder.parent
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as made:
        path = Path(made) / "probe"
        block = os.urandom(1 << 20)
        with path.open("wb", buffering=0) as file:
            started = time.perf_counter()
            for _ in range(PROBE_BYTES >> 20):
                file.write(block)
            os.fsync(file.fileno())
            rate = PROBE_BYTES / (time.perf_counter() - started)
            took = []
            for _ in range(PROBE_FSYNCS):
                started = time.perf_counter()
                file.write(block[:4096])
                os.fsync(file.fileno())
                took.append(time.perf_counter() - started)
    return DiskProbe(
        folder=folder, free_bytes=shutil.disk_usage(folder).free, fsync_s=sorted(took)[len(took) // 2], bytes_s=rate
    )


def judge_disk(found: DiskProbe, *, durability: str, needed_bytes: int | None) -> Finding:
    """`needed_bytes`: estimate of what the run writes; None: not known."""
    said = (
        f"{found.folder}: {1 / max(found.fsync_s, 1e-9):.0f} fsyncs/s, {megabytes(found.bytes_s)}/s, "
        f"{megabytes(found.free_bytes)} free"
    )
    if needed_bytes is not None:
        said += f"; the run may write {megabytes(needed_bytes)}"
        if found.free_bytes < needed_bytes:
            return error(
                "disk", said, "make room, choose another --run-dir, or lower checkpoint.keep, or set buffer.keep_steps"
            )
    if durability == "power" and found.fsync_s > SLOW_FSYNC_S:
        return warning("disk", said, "buffer.durability=power waits for an fsync a commit; use a faster disk")
    if found.bytes_s < SLOW_DISK_BYTES_S:
        return warning("disk", said, "slow for checkpoints; choose a --run-dir on a local disk")
    return ok("disk", said)
