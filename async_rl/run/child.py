"""A process of a run: started with the right surroundings, and how it ended in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from async_rl.errors import RunFailed, UserError
from async_rl.events import MemoryRanOut, RunResumed
from async_rl.process import CAUSE_PIPE, PARENT_PIPE, TOLD_TO_END, speaks_of_memory
from async_rl.run.memory import advice
from async_rl.run_folder import RunFolder
from async_rl.wire.heartbeat import PULSE_PIPE

# -------------------- memory kills
# Whether the kernel has ended a process because memory ran out. It leaves SIGKILL and no word, as others do; but
# it counts what it ends.


def memory_kills(root: Path = Path("/")) -> int | None:
    """Processes ended so far for lack of memory, on this machine and in this control group; None where nothing
    counts them. Only a change means something."""
    files = [root / "proc/vmstat", root / "sys/fs/cgroup/memory.events"]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                files.append(root / "sys/fs/cgroup" / line.removeprefix("0::/") / "memory.events")
    found = [count for file in dict.fromkeys(files) if (count := _counted(file)) is not None]
    return sum(found) if found else None


def _counted(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


MOST_SAID = 500
"""characters of what is said of a failed allocation: torch adds a page of advice of its own"""
KILLED_FOR_MEMORY = "was killed by the kernel because memory ran out (SIGKILL)"
PIPE_BYTES = 1 << 16
"""what a pipe holds"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is started, again after a death."""

    name: str
    words: tuple[str, ...]
    """module and its arguments"""
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """of its own, e.g. which GPUs it sees"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    command: Command
    folder: RunFolder
    process: subprocess.Popen[bytes]
    said: dict[str, Any]
    """what it sent of its failure when it ended; empty before, and when it could not"""
    cause_pipe: FileIO
    """from which that comes"""
    memory_kills: int | None = None
    """processes that had been ended for lack of memory before this one began"""

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def log(self) -> Path:
        return self.folder.logs / f"{self.name}.log"

    @property
    def failed_at(self) -> float:
        """When it recorded its failure; 0 when something killed it before it could, or there is none."""
        return float(self.failure().get("time", 0.0))

    def failure(self) -> dict[str, Any]:
        """What it left of its failure: in the run folder or, when nothing could be written there, by its pipe."""
        if self.ended and not self.said:
            with suppress(ValueError, OSError):
                said = (self.cause_pipe.read(PIPE_BYTES) or b"").splitlines()
                self.said.update(json.loads(said[-1] if said else b""))  # of several the last knows the others
        with suppress(ValueError, OSError):  # a full disk leaves it empty
            return dict(json.loads(self.folder.failure(self.name).read_text()))
        return self.said

    def close(self) -> None:
        """It has ended, and nobody will ask why. May be called twice."""
        self.cause_pipe.close()

    def cause(self) -> Exception:
        """Why it ended: what it recorded, or how it was killed."""
        if reason := self.failure():
            if reason["kind"] == "user":
                return UserError(reason["message"])
            if reason["kind"] == "memory" or speaks_of_memory(reason["message"]):
                return RunFailed(self._out_of_memory(f"{self.name}: memory ran out: {reason['message']}"))
            return RunFailed(f"{self.name}: {reason['message']} (log: {self.log})")
        said = _tail(self.log)
        where = f"its last words, in {self.log}:{said}" if said else "it left no word"
        how = how_it_ended(self.process.returncode, self.memory_kills)
        if how == KILLED_FOR_MEMORY:
            return RunFailed(self._out_of_memory(f"{self.name} {how}"))
        return RunFailed(f"{self.name} {how}; {where}")

    def _out_of_memory(self, said: str) -> str:
        seen: list[int] = []
        for row in self.folder.read_events():
            match row.event:
                case RunResumed():
                    seen.clear()  # an earlier life may have had other settings
                case MemoryRanOut(tokens=tokens):
                    seen.append(tokens)
        largest = seen[-1] if seen else None
        return f"{said[:MOST_SAID]} (log: {self.log})\n{advice(self.folder.settings(), self.name, largest)}"


def arithmetic_environment(threads: int) -> dict[str, str]:
    """Variables that must stand before torch is imported."""
    return {
        # two processes with a thread a core each run ten times slower
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # every batch has another number of tokens: oneDNN would keep a kernel for a thousand of them (1 GB)
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",  # the same of the layer above oneDNN
        # activations of one step are the next step's: keep freed memory (glibc; a tenth of a step's time)
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    }


def start_child(command: Command, folder: RunFolder, *, parent_pipe: int, pulse_pipe: int, lock: int) -> Child:
    """`parent_pipe`: the end that closes when the launcher dies; `pulse_pipe`: the end that takes signs of life;
    `lock`: of the run, kept until the last process is gone."""
    cause, said = os.pipe()
    before = memory_kills()
    environment = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # GPUs are counted as nvidia-smi shows them
        **os.environ,
        **arithmetic_environment(command.threads),
        **command.environment,
        PARENT_PIPE: str(parent_pipe),
        CAUSE_PIPE: str(said),
        PULSE_PIPE: str(pulse_pipe),
    }
    with (folder.logs / f"{command.name}.log").open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            pass_fds=(parent_pipe, pulse_pipe, lock, said),
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
        )
    os.close(said)
    os.set_blocking(cause, False)
    return Child(
        command=command,
        folder=folder,
        process=process,
        said={},
        cause_pipe=FileIO(cause, "rb"),
        memory_kills=before,
    )


def tell_to_end(some: Sequence[Child], patience_s: float) -> list[Child]:
    """SIGTERM to each; those that have not ended `patience_s` later."""
    for child in some:
        child.process.terminate()
    deadline = time.monotonic() + patience_s
    for child in some:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
    return [child for child in some if not child.ended]


def how_it_ended(code: int, kills_before: int | None = None) -> str:
    """An exit code of a process that recorded no reason, in words. `kills_before`: for lack of memory, when it
    was started, if that is known."""
    if code == TOLD_TO_END:
        return "was told to end from outside (SIGTERM)"
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        kills = memory_kills()
        if kills is None or kills_before is None:
            return "was killed from outside (SIGKILL), or the machine ran out of memory"
        if kills > kills_before:
            return KILLED_FOR_MEMORY
        return "was killed from outside (SIGKILL), not by the kernel for lack of memory"
    return f"was killed from outside ({name})" if name == "SIGTERM" else f"crashed ({name})"


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
    return "".join(f"\n  {line}" for line in text)
