"""Settings of low-rank adapters; a part of run.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from async_rl.config import setting
from async_rl.errors import UserError


@dataclass(frozen=True)
class LoraSettings:
    rank: int = setting(
        0,
        "rank of the adapters (LoRA) that are trained while the model's own weights stay as they are; 0 trains all weights",
    )
    alpha: float = setting(16.0, "an adapter's product is multiplied by alpha / rank")
    targets: list[str] = setting(
        [],
        "linear layers that get an adapter, by the last part of their names, e.g. [q_proj, v_proj]; empty: all of them but the head",
    )
    send: Literal["merged", "adapter"] = setting(
        "merged",
        "what travels to the generators: the whole model with the adapters added, or the adapters alone, which each generator adds to its own copy of the model",
    )


def check_lora(lora: LoraSettings, transport: str) -> None:
    """`transport`: weights.transport. Raises UserError for what would do nothing."""
    if lora.rank == 0:
        if lora != LoraSettings():
            raise UserError("lora.* does nothing with lora.rank=0, which trains all weights; set lora.rank, e.g. 16")
        return
    if len(set(lora.targets)) < len(lora.targets):
        raise UserError(f"lora.targets names a layer twice: {', '.join(lora.targets)}; once is enough")
    if lora.send == "adapter" and transport not in ("auto", "shared_memory", "stream"):
        raise UserError(
            f"lora.send=adapter needs generators that add adapters to their own copy, and with weights.transport="
            f"{transport} weights go straight into the engine; set lora.send=merged or leave weights.transport out"
        )
