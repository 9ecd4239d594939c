"""What a process of a run is told when it is started: one JSON document, its last argument.

The launcher makes a spec for each child, `python -m MODULE JSON` starts the child, and the child's `main` reads the
spec with `read_spec`. Only what libraries themselves read stays in the environment: OMP_NUM_THREADS and the like,
CUDA_VISIBLE_DEVICES, and torchrun's RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

NO_PIPE = -1


class Pipes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """File descriptors that a child inherits: its ends of pipes to the launcher; NO_PIPE where there is none."""

    parent: int = NO_PIPE
    """closes when the launcher ends, however it ends: the child then ends, too"""
    cause: int = NO_PIPE
    """takes the cause of a bad end, also when no file can be written"""
    pulse: int = NO_PIPE
    """takes the signs of life"""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every process of a run is told."""

    run: str
    """folder of the run"""
    name: str
    """in logs, events and messages"""
    pipes: Pipes = Pipes()
    cores: tuple[tuple[int, ...], ...] = ()
    """that its threads keep to; of several ranks one entry each; empty: any"""

    @property
    def path(self) -> Path:
        return Path(self.run)

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


class BufferSpec(ProcessSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `python -m async_rl.buffer`. Without the digest no generator may join by itself."""

    endpoint: str
    """where it listens"""
    train_problems: int
    """in the task's train split"""
    vocabulary: int
    """tokens are below it"""
    version: int
    """of the weights that the run begins or goes on with"""
    task_digest: str = ""
    """of the problems, which a joining generator must have as well"""
    segment: str = ""
    """file of the weights in shared memory, for generators of this host"""
    weights_endpoint: str = ""
    """of the weight server, for generators of other hosts; empty: there is none"""


class TrainerSpec(ProcessSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `python -m async_rl.trainer`, and of what stands for it: the agent of several ranks (run/agent.py), and the
    stand-in of a trainer that somebody else starts (run/external.py)."""

    endpoint: str
    """of the buffer"""
    version: int
    """of the weights that training begins or goes on with"""
    ways: tuple[str, ...] = ()
    """that weights take to the run's own generators; empty: not known"""
    agent: int = 0
    """process number of the agent that started this rank; 0: there is none"""
    weights_endpoint: str = ""
    """of the weight server, to which rank 0 sends its weights from another machine than the run's; else empty"""
    keys: str = ""
    """folder of this machine's keys; empty: wire.keys"""


class GeneratorSpec(ProcessSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `python -m async_rl.generator`."""

    endpoint: str
    """of the buffer"""
    weights_endpoint: str = ""
    """of the weight server; empty: there is none"""
    way: str = ""
    """that weights take to it; empty: shared memory or a stream, as is found"""


class WeightServerSpec(ProcessSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `python -m async_rl.weights.stream`."""

    endpoint: str
    """where it listens"""


class TrackerSpec(ProcessSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `python -m async_rl.observe`."""

    version: int
    """of the weights that this launch begins or goes on with"""
    trackers: tuple[str, ...]
    """names"""


SomeSpec = TypeVar("SomeSpec", bound=ProcessSpec)


def read_spec(kind: type[SomeSpec]) -> SomeSpec:
    """From this process's only argument. Ends the process when that is something else."""
    return parse_spec(kind, sys.argv[1:])


def parse_spec(kind: type[SomeSpec], words: Sequence[str]) -> SomeSpec:
    """Raises SystemExit, with the reason, unless `words` is one document of this kind."""
    try:
        (text,) = words
        return msgspec.json.decode(text, type=kind)
    except ValueError as error:  # msgspec.ValidationError is one, too
        raise SystemExit(
            f"async-rl: this process is started by `async-rl run`, with one JSON document ({kind.__name__}): {error}"
        ) from None
