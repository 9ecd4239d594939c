"""Versions of what a run stands on."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from async_rl.doctor.finding import Finding, error, ok, warning
from async_rl.wire.library import Library, library

OLDEST_PYTHON = (3, 11)
OLDEST_SQLITE = (3, 35)
"""UPSERT with several clauses, write-ahead logs without known faults"""
REQUIRED = {"torch": "2.11", "numpy": "2.0", "omegaconf": "2.4", "safetensors": "0.5", "tokenizers": "0.21"}
"""package -> oldest version"""
OPTIONAL = {
    "vllm": "an engine for GPUs",
    "flash-attn": "faster attention on GPUs",
    "transformers": "models the built-in decoder does not define",
    "math-verify": "the reward 'math'",
    "pyarrow": "Parquet files",
}
"""package -> what it would be for"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    python: str
    sqlite: str
    packages: dict[str, str]
    """installed ones of REQUIRED and OPTIONAL -> version"""
    zmq: Library


def read_software() -> Software:
    packages = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Software(
        python=platform.python_version(), sqlite=sqlite3.sqlite_version, packages=packages, zmq=library()
    )


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


def judge_zmq(found: Library) -> Finding:
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
