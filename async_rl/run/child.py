"""One process of a run: how it is started, and why it ended, in words."""

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

from msgspec.structs import replace

from async_rl.errors import RunFailed, UserError
from async_rl.events import MemoryRanOut, RunResumed
from async_rl.process import TOLD_TO_END, is_out_of_memory
from async_rl.process_spec import Pipes, ProcessSpec
from async_rl.run.memory import advice
from async_rl.run_folder import RunFolder

MOST_SAID = 500
"""characters that are quoted of a failed allocation: torch adds a page of advice of its own"""
KILLED_FOR_MEMORY = "was killed by the kernel because memory ran out (SIGKILL)"
PIPE_BYTES = 1 << 16
"""what a pipe holds"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is started, and started again after a death."""

    module: tuple[str, ...]
    """that Python executes, and words before the spec"""
    spec: ProcessSpec
    """without pipes: each start makes new ones"""
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    """of its own, e.g. which GPUs it sees"""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A process that was started."""

    command: Command
    folder: RunFolder
    process: subprocess.Popen[bytes]
    said: dict[str, Any]
    """the cause that it sent when it ended; empty before, and when it could send none"""
    cause_pipe: FileIO
    """from which that comes"""
    memory_kills: int | None = None
    """processes that the kernel had ended for lack of memory before this one was started"""

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
        """When it recorded its failure, by the clock that all processes of a machine share (time.monotonic); 0 when
        something killed it before it could, or there is none."""
        return float(self.failure().get("time", 0.0))

    def failure(self) -> dict[str, Any]:
        """The cause it left: in the run folder or, when nothing could be written there, in its pipe."""
        if self.ended and not self.said:
            with suppress(ValueError, OSError):
                lines = (self.cause_pipe.read(PIPE_BYTES) or b"").splitlines()
                self.said.update(json.loads(lines[-1] if lines else b""))  # of several the last knows the others
        with suppress(ValueError, OSError):  # a full disk leaves an empty file
            return dict(json.loads(self.folder.failure(self.name).read_text()))
        return self.said

    def close(self) -> None:
        """Free the pipe once it has ended and nobody will ask why. May be called twice."""
        self.cause_pipe.close()

    def cause(self) -> Exception:
        """Why it ended: what it recorded, or how it was killed."""
        if reason := self.failure():
            if reason["kind"] == "user":
                return UserError(reason["message"])
            if reason["kind"] == "memory" or is_out_of_memory(reason["message"]):
                return RunFailed(self._out_of_memory(f"{self.name}: memory ran out: {reason['message']}"))
            return RunFailed(f"{self.name}: {reason['message']} (log: {self.log})")
        last_lines = _tail(self.log)
        where = f"its last words, in {self.log}:{last_lines}" if last_lines else "it left no word"
        how = describe_end(self.process.returncode, self.memory_kills)
        if how == KILLED_FOR_MEMORY:
            return RunFailed(self._out_of_memory(f"{self.name} {how}"))
        return RunFailed(f"{self.name} {how}; {where}")

    def _out_of_memory(self, message: str) -> str:
        seen: list[int] = []
        for row in self.folder.read_events():
            match row.event:
                case RunResumed():
                    seen.clear()  # an earlier life may have had other settings
                case MemoryRanOut(tokens=tokens):
                    seen.append(tokens)
        largest = seen[-1] if seen else None
        return f"{message[:MOST_SAID]} (log: {self.log})\n{advice(self.folder.settings(), self.name, largest)}"


def start_child(command: Command, folder: RunFolder, *, pipes: Pipes, lock: int) -> Child:
    """Start `command` with the child's ends of the launcher's `pipes` and a new pipe for its cause. `lock`: descriptor
    of the run's lock, which the child holds until it ends."""
    cause_read, cause_write = os.pipe()
    kills_before = memory_kills()
    spec = replace(command.spec, pipes=replace(pipes, cause=cause_write))
    environment = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # GPUs are counted as nvidia-smi shows them
        **os.environ,
        **arithmetic_environment(command.threads),
        **command.environment,
    }
    process = spawn(
        command.module,
        spec,
        folder,
        environment=environment,
        descriptors=(pipes.parent, pipes.pulse, lock, cause_write),
    )
    os.close(cause_write)
    os.set_blocking(cause_read, False)
    return Child(
        command=command,
        folder=folder,
        process=process,
        said={},
        cause_pipe=FileIO(cause_read, "rb"),
        memory_kills=kills_before,
    )


def spawn(
    module: Sequence[str],
    spec: ProcessSpec,
    folder: RunFolder,
    *,
    environment: Mapping[str, str],
    descriptors: Sequence[int],
) -> subprocess.Popen[bytes]:
    """`python -m MODULE JSON`, writing to its log in the run folder and inheriting `descriptors`."""
    with (folder.logs / f"{spec.name}.log").open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *module, spec.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
        )


def arithmetic_environment(threads: int) -> dict[str, str]:
    """Variables that libraries read when torch is imported. `threads`: 0 (not chosen) counts as 1."""
    number = str(max(1, threads))
    return {
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "OPENBLAS_NUM_THREADS": number,
        # A thread without work leaves its core to others. Spinning, two processes with a thread a core each run ten
        # times slower. Whoever has the machine for one process may choose ACTIVE.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
        # every batch has another number of tokens: oneDNN would keep a kernel for a thousand of them (1 GB)
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",  # the same of the layer above oneDNN
        # activations of one step are the next step's: keep freed memory (glibc; a tenth of a step's time)
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    }


def terminate(children: Sequence[Child], within_s: float) -> list[Child]:
    """Send SIGTERM to each; those that have not ended `within_s` later."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + within_s
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
    return [child for child in children if not child.ended]


def ended_from_outside(child: Child) -> bool:
    """Whether a signal of somebody else ended it, as far as that can be known."""
    code = child.process.returncode
    if code == -signal.SIGKILL:
        return describe_end(code, child.memory_kills) != KILLED_FOR_MEMORY
    return code in (TOLD_TO_END, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


def describe_end(code: int, kills_before: int | None = None) -> str:
    """What the exit code of a process that recorded no cause means. `kills_before`: `memory_kills` when it was
    started, if known."""
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


def memory_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has ended so far for lack of memory, on this machine and in this control group;
    None where nothing counts them. The kernel sends SIGKILL and leaves no word; a count that has grown tells such a
    death from another kill."""
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


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
    return "".join(f"\n  {line}" for line in text)
