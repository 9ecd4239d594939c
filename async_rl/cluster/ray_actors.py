"""The actors of a run on Ray: each starts one process of the run on its node, watches it, and tells how it ended.

Ray sees actors with readable names; what they do is in processes of their own (ray_process.py), which end with their
actor. Nothing of the run's data goes through Ray. The classes are plain ones: the command makes them actors
(ray_run.py), so that nothing here needs Ray to be imported.

Who waits for whom: the command for `ended` of every actor; an actor for its process.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from async_rl.cluster.ray_process import AnyOrder, GeneratorOrder, Outcome, RankOrder, RunOrder
from async_rl.run.child import describe_end, memory_kills
from async_rl.run_folder import RowTail, RunFolder, read_rows
from async_rl.wire.endpoint import as_reached_by, hold_port, port_of, this_host

SHARED_MEMORY = Path("/dev/shm")
MOST_LINES = 10_000
"""of the run's output that wait for the command"""
READY_POLL_S = 0.2
CRASHED = 70
"""exit code of an actor whose process crashed: Ray starts it again"""

Answer = dict[str, Any]
"""what actors answer: plain values, so that Ray needs nothing of ours to carry them"""


class Beside:
    """An actor's process. `ended` waits for it; `signal` passes on how it is to end."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """`keys`: files of the folder of CURVE keys, by name."""
        where = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.place = Path(tempfile.mkdtemp(prefix="async-rl-ray-", dir=where))
        self.keys = self.place / "keys"
        self.keys.mkdir(mode=0o700)
        for name, content in keys.items():
            with open(os.open(self.keys / name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(content)
        self.process: subprocess.Popen[str] | None = None
        self.kills_before = memory_kills()
        self.over = threading.Event()

    def start(self, order: AnyOrder, *, output: int | None = None) -> None:
        """Start the process. `output`: where its lines go; None: where the actor's go, which is a log of Ray's."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl.cluster.ray_process", msgspec.json.encode(order).decode()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
            text=True,
            env=_environment(sees_gpus=isinstance(order, RunOrder)),
        )
        threading.Thread(target=self._watch, args=(self.process,), name="watch", daemon=True).start()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        code = process.wait()
        self.after(code)
        self.over.set()

    def after(self, code: int) -> None:
        """The process has ended with this code."""

    @property
    def outcome(self) -> Path:
        """File of how the process ended."""
        return self.place / "outcome.json"

    def ended(self) -> Answer:
        """Wait for the end of the process: its exit code, and how it ended."""
        self.over.wait()
        assert self.process is not None
        code = int(self.process.returncode)
        found = Outcome(kind="done" if code == 0 else "failed", message="" if code == 0 else self.described(code))
        with suppress(OSError, msgspec.DecodeError):
            found = msgspec.json.decode(self.outcome.read_bytes(), type=Outcome)
        shutil.rmtree(self.place, ignore_errors=True)
        return {"code": code, "kind": found.kind, "message": found.message, "summary": found.summary, **where_am_i()}

    def described(self, code: int) -> str:
        """How the process ended, where it could not say so itself."""
        return describe_end(code if code <= 128 else 128 - code, self.kills_before)

    def signal(self, number: int) -> None:
        """Pass a signal on to the process."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number) if number == signal.SIGKILL else self.process.send_signal(number)

    def where(self) -> Answer:
        """The node, and the process beside the actor."""
        return {**where_am_i(), "child": self.process.pid if self.process is not None else 0}


class Buffer(Beside):
    """The run with its launcher, buffer and weight server; what it shows and how it stands."""

    def __init__(self, order: RunOrder, keys: Mapping[str, bytes], marker: str) -> None:
        """`marker`: a file beside the run's folder that this node must see, as the command does."""
        super().__init__(keys)
        self.found = ""
        self.lines: deque[str] = deque(maxlen=MOST_LINES)
        self.folder = RunFolder(Path(order.directory, order.path))
        self.refused = "" if Path(marker).is_file() else f"it does not see {Path(marker).parent}"
        if self.refused:
            return
        self.rows = RowTail(self.folder.metrics)
        self.idle: deque[float] = deque(maxlen=3600)
        self.waited_s, self.steps, self.connected = 0.0, 0, 0
        self.read_at = time.monotonic()
        self.before = _launches(self.folder)
        self.rows.skip()
        address = where_am_i()["ip"]
        words = order.words
        if order.listens:
            words = (f"wire.endpoint=tcp://{address}:*", f"wire.keys={self.keys}", *words)
        self.start(
            msgspec.structs.replace(
                order, parent=os.getpid(), keys=str(self.keys), outcome=str(self.outcome), words=words
            ),
            output=subprocess.PIPE,
        )
        assert self.process is not None
        threading.Thread(target=self._read, args=(self.process,), name="lines", daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))

    def look(self) -> Answer:
        """New lines of the run's output; where generators and trainer find it, once it is ready; whether it has
        ended."""
        lines = []
        if not self.found and not self.refused:
            self.found = self._endpoint()
        while self.lines:
            lines.append(self.lines.popleft())
        return {
            "lines": lines,
            "refused": self.refused,
            "endpoint": self.found,
            "over": self.over.is_set(),
            **where_am_i(),
        }

    def _endpoint(self) -> str:
        """Where the buffer of this launch listens, once the trainer is awaited; empty before."""
        launch, endpoint, awaited = 0, "", False
        for row in read_rows(self.folder.events):
            match row:
                case {"event": "started", "process": "buffer"}:
                    launch, endpoint, awaited = launch + 1, "", False
                case {"event": "buffer_ready", "endpoint": str(found)}:
                    endpoint = found
                case {"event": "trainer_awaited"}:
                    awaited = True
        ready = awaited and endpoint and launch > self.before
        return as_reached_by(endpoint, f"tcp://{where_am_i()['ip']}:0") if ready else ""

    def port(self, address: str) -> int:
        """A port of this node that is held for the trainer's ranks, which meet there."""
        self.meeting = hold_port(address)
        return port_of(self.meeting)

    def waits(self, *, anew: bool) -> Answer:
        """Who waited for whom since the last call with `anew`."""
        for row in self.rows.new():
            self.steps += 1
            self.waited_s += float(row.get("time/wait_for_batch", 0.0))
            self.connected = int(row.get("generators", 0))
        with suppress(OSError, msgspec.DecodeError, TypeError):
            found = msgspec.json.decode(self.folder.live.read_bytes())
            held = [p["held"] for p in found["processes"] if p.get("role") == "generator" and "held" in p]
            if self.connected:  # one that has never had work has no row
                self.idle.append(1 - min(1.0, sum(one > 0 for one in held) / self.connected))
        now = time.monotonic()
        answer: Answer = {
            "steps": self.steps,
            "seconds": now - self.read_at,
            "trainer_waited_s": self.waited_s,
            "generators_idle": sum(self.idle) / len(self.idle) if self.idle else 0.0,
            "connected": self.connected,
        }
        if anew:
            self.steps, self.waited_s, self.read_at = 0, 0.0, now
            self.idle.clear()
        return answer


class TrainerRank(Beside):
    """One rank of the trainer."""

    def __init__(self, order: RankOrder, keys: Mapping[str, bytes]) -> None:
        super().__init__(keys)
        self.start(
            msgspec.structs.replace(order, parent=os.getpid(), keys=str(self.keys), outcome=str(self.outcome)),
        )


class Generator(Beside):
    """A generator. When its process crashes this actor ends, and Ray starts both again."""

    def __init__(self, order: GeneratorOrder, keys: Mapping[str, bytes], words: Sequence[str]) -> None:
        """`words`: `name=value`, in which `{here}` stands for the folder that Ray has carried to this node."""
        super().__init__(keys)
        here = os.getcwd()
        self.start(
            msgspec.structs.replace(
                order,
                parent=os.getpid(),
                keys=str(self.keys),
                outcome=str(self.outcome),
                directory=here,
                words=tuple(word.replace("{here}", here) for word in words),
            )
        )

    def after(self, code: int) -> None:
        """Ends this actor after a crash, so that Ray's policy decides."""
        kind = ""
        with suppress(OSError, msgspec.DecodeError):
            kind = msgspec.json.decode(self.outcome.read_bytes(), type=Outcome).kind
        if code == 0 or kind in ("user", "interrupted"):
            return
        print(f"async-rl: the generator's process {self.described(code)}", file=sys.stderr, flush=True)
        shutil.rmtree(self.place, ignore_errors=True)
        os._exit(CRASHED)


def where_am_i() -> Answer:
    """This node, as the cluster knows it."""
    import ray

    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "ip": ray.util.get_node_ip_address(),
        "host": this_host(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
    }


def _launches(folder: RunFolder) -> int:
    """Launches of the run before this one."""
    return sum(row.get("event") == "started" and row.get("process") == "buffer" for row in read_rows(folder.events))


def _environment(*, sees_gpus: bool) -> dict[str, str]:
    """Of the process: the actor's, without what is for Ray itself. `sees_gpus`: it uses none, and finds out whether the
    trainer beside it has what it needs."""
    out = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_NUM_THREADS", "RAY_JOB_"))}
    if sees_gpus and not out.get("CUDA_VISIBLE_DEVICES"):
        out.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs of a node from an actor that asks for none
    return out
