"""Settings of how the processes of a run reach each other; a part of run.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config import setting
from async_rl.errors import UserError


@dataclass(frozen=True)
class WireSettings:
    endpoint: str = setting(
        "auto",
        "where the buffer listens: auto (a Unix socket of this run), ipc://PATH or tcp://HOST:PORT; without a host (tcp://:PORT) on the loopback only, on every interface with tcp://0.0.0.0:PORT",
    )
    keys: str = setting("", "folder of the CURVE keys (`async-rl keys` makes them) that tcp is served with, never without")
    connect: str = setting(
        "", "where generators and trainer connect, if not at wire.endpoint itself: the near end of a tunnel or proxy"
    )
    timeout_s: float = setting(
        120.0, "longest wait of any process for another before the run ends with an error", unit="seconds"
    )
    frozen_after_s: float = setting(
        15.0,
        "a process that gives no sign of life for so long (a busy one gives them, a stopped one does not) is taken for frozen: it is ended; a generator is started again and its permits go to others, without trainer or buffer the run ends",
        unit="seconds",
    )
    stall_report_s: float = setting(
        10.0,
        "a wait that takes longer is reported on the console and in events.jsonl: who waits for whom, since when, for what",
        unit="seconds",
    )
    max_message_mb: int = setting(256, "larger messages are refused", unit="MB")


@dataclass(frozen=True)
class WeightsSettings:
    transport: Literal["auto", "shared_memory", "stream", "nccl", "ipc"] = setting(
        "auto",
        "how generators get weights: from the trainer's shared memory; as a stream from the weight server, which runs with a tcp endpoint; from GPU to GPU into vLLM, over NCCL (other GPUs) or CUDA IPC (the trainer's own); auto: what the placement allows, see docs/weights.md",
    )
    timeout_s: float = setting(
        120.0,
        "nccl and ipc: longest time one transfer to one generator may take, the meeting before the first included; then the generator is given up and starts anew",
        unit="seconds",
    )
    endpoint: str = setting(
        "auto",
        "where the weight server listens, tcp://HOST:PORT as for wire.endpoint; auto: a free port beside the buffer's",
    )


def check_wire(wire: WireSettings, weights: WeightsSettings) -> None:
    """TCP with keys, keys with TCP, a weight server with TCP. Raises UserError."""
    tcp = wire.endpoint.startswith("tcp://")
    if tcp and not wire.keys:
        raise UserError(
            f"wire.endpoint is {wire.endpoint}, but wire.keys is not set: TCP is served with keys only; "
            "`async-rl keys DIR` makes them, then wire.keys=DIR"
        )
    if wire.keys and not tcp:
        raise UserError(
            f"wire.keys is {wire.keys}, but wire.endpoint={wire.endpoint} is no tcp endpoint, and a Unix socket needs "
            "none; set wire.endpoint=tcp://HOST:PORT or leave wire.keys out"
        )
    if not tcp and weights.transport == "stream":
        raise UserError(
            f"weights.transport is stream, but with wire.endpoint={wire.endpoint} no weight server runs: every "
            "generator is on this host; set wire.endpoint=tcp://HOST:PORT or leave weights.transport out"
        )
    if not tcp and weights.endpoint != "auto":
        raise UserError(
            f"weights.endpoint is {weights.endpoint}, but with wire.endpoint={wire.endpoint} no weight server runs; "
            "set wire.endpoint=tcp://HOST:PORT or leave weights.endpoint out"
        )
    if weights.endpoint != "auto" and not weights.endpoint.startswith("tcp://"):
        raise UserError(f"weights.endpoint is {weights.endpoint}; it must be auto or tcp://HOST:PORT")
    if wire.connect and not wire.connect.startswith("tcp://" if tcp else "ipc://"):
        raise UserError(
            f"wire.connect is {wire.connect!r}; it must look like {'tcp://HOST:PORT' if tcp else 'ipc://PATH'}, as what "
            f"it leads to (wire.endpoint={wire.endpoint})"
        )
