"""Demonstrations as tokens, in a file of the run's folder: written before it begins, read when its store is made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgpack

from async_rl.trajectory.codec import pack, unpack
from async_rl.trajectory.types import Trajectory

Shown = tuple[int, Trajectory]
"""the training problem that is answered, -1 where that is not known; and the answer as a trajectory without a policy:
log-probs of 0, so that its tokens stand over a denominator of 1"""


def write_demonstrations(path: Path, shown: Iterable[Shown]) -> None:
    """A msgpack list of [problem, blob]."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(msgpack.packb([(problem, pack(t)) for problem, t in shown]))
    os.replace(partial, path)


def read_demonstrations(path: Path) -> list[Shown]:
    """In the order in which they were written; none where there is no file."""
    if not path.is_file():
        return []
    return [(problem, unpack(blob)) for problem, blob in msgpack.unpackb(path.read_bytes())]
