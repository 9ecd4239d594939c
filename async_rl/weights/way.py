"""Which transport carries weights to a generator: a pure function of the setting and of where both sides are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from async_rl.errors import UserError

Way = Literal["shared_memory", "stream", "nccl", "ipc"]
Asked = Literal["auto", "shared_memory", "stream", "nccl", "ipc"]
LINKS: tuple[Way, ...] = ("nccl", "ipc")
"""transports from the trainer's GPU straight into vLLM's workers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The trainer and one generator."""

    same_host: bool
    engine: Literal["embedded", "vllm"]
    trainer_gpu: str = ""
    """the GPU of rank 0, which sends; empty: it trains on the CPU"""
    generator_gpus: tuple[str, ...] = ()
    """all GPUs that hold the generator's model; empty: it is on the CPU. Both name physical GPUs, not those visible to
    a process"""
    ipc_works: bool = True
    """vLLM's module for CUDA IPC can be imported (0.26 needs ray for it)"""
    adapters_alone: bool = False
    """only adapters are sent, which the generator adds to its own copy of the model"""


def choose(asked: Asked, sides: Sides) -> Way:
    """The transport from the trainer to a generator. Raises UserError, with the reason, for a setting that cannot
    work."""
    if asked in LINKS:
        problem = _obstacle(asked, sides)
        if problem:
            raise UserError(f"weights.transport is {asked}, but {problem}; leave weights.transport out")
        return asked
    if asked == "auto":
        possible = [way for way in LINKS if not _obstacle(way, sides)]
        return possible[0] if possible else ("shared_memory" if sides.same_host else "stream")
    if asked == "shared_memory" and not sides.same_host:
        raise UserError(
            "weights.transport is shared_memory, but the trainer's memory is not on this host; leave weights.transport "
            "out"
        )
    return asked


def needs_segment(ways: Collection[str], *, tcp: bool) -> bool:
    """Whether the trainer keeps its weights in shared memory too: for generators without a link, for generators that
    may join (`tcp`), and where `ways` is not known."""
    return tcp or not ways or not set(ways) <= set(LINKS)


def _obstacle(way: Way, sides: Sides) -> str:
    """Why this link cannot work; empty if it can. At most one of the two links can."""
    if not sides.same_host:
        return f"the trainer is on another host, and {way} is for GPUs of one"
    if sides.engine != "vllm":
        return f"generator.engine is {sides.engine}: only vLLM takes weights over {way}"
    if sides.adapters_alone:
        return f"lora.send is adapter: over {way} whole weights go straight into the engine"
    for name, gpus in (("trainer", sides.trainer_gpu), ("generator", sides.generator_gpus)):
        if not gpus:
            return f"the {name} is on no GPU that this run has placed, and {way} leads from GPU to GPU"
    if way == "nccl" and sides.trainer_gpu in sides.generator_gpus:
        return f"GPU {sides.trainer_gpu} holds both the trainer and a generator, and NCCL takes one process a GPU"
    if way == "ipc" and sides.generator_gpus != (sides.trainer_gpu,):
        held = ", ".join(sides.generator_gpus)
        return f"the trainer sends from GPU {sides.trainer_gpu} and a generator is on {held}: CUDA IPC stays on one GPU"
    if way == "ipc" and not sides.ipc_works:
        return "vLLM 0.26 takes weights over ipc with ray only, which is not installed"
    return ""
