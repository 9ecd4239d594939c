"""What this machine has for a run: the edge of placement.py."""

from __future__ import annotations

import os

from async_rl.launch.placement import Heads, Machine, Placement, place
from async_rl.model.folder import CONFIG, existing, read_json
from async_rl.settings import Settings


def look_at_machine(settings: Settings) -> Machine:
    """GPUs that torch can use, in the order settings count them, and cores. Imports torch only when `settings` ask
    for a GPU."""
    asked = any(device.startswith("cuda") for device in (settings.generator.device, settings.trainer.device))
    return Machine(gpus=visible_gpus() if asked else (), cores=tuple(sorted(os.sched_getaffinity(0))))


def placed(settings: Settings) -> Placement:
    """Where a run's processes are on this machine. Raises UserError when they cannot be."""
    return place(settings, look_at_machine(settings), read_heads(settings))


def visible_gpus() -> tuple[str, ...]:
    """What each is called in CUDA_VISIBLE_DEVICES, so that a process can be given some of them."""
    import torch

    # by NVML where it is there: no CUDA context is made in this process
    count = torch.cuda.device_count()
    return names_of(count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def names_of(count: int, visible: str | None) -> tuple[str, ...]:
    """`count` GPUs, of which the user has chosen `visible` (numbers, or names like GPU-8932f937); None: all."""
    if visible is None:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in visible.split(",") if name.strip())[:count]


def read_heads(settings: Settings) -> Heads | None:
    """From the model's config.json; None when it does not say. Raises UserError without a model."""
    values = read_json(existing(settings.model.path) / CONFIG)
    values = values.get("text_config") or values
    query = values.get("num_attention_heads")
    if not isinstance(query, int):
        return None
    return Heads(query=query, key_value=int(values.get("num_key_value_heads") or query))
