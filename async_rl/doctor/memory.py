"""Is there room for what a run takes? Memory by the estimate of launch/memory.py, and the disk."""

from __future__ import annotations

from async_rl.doctor.finding import Finding, error, ok, warning
from async_rl.launch.memory import Estimate, megabytes
from async_rl.settings import Settings

MOST_SHARE = 0.9
"""of what is there; the system and the caches of files need the rest"""
TRAJECTORY_BYTES, TOKEN_BYTES = 400, 9
"""in the store"""


def disk_bytes(settings: Settings, found: Estimate) -> int:
    """What a run may write, with sequences half as long as the context: trajectories, and kept checkpoints of
    weights and two moments (one more while it is written)."""
    length = found.context // 2 or 1024
    trajectories = settings.batch.groups_per_step * settings.batch.group_size
    steps = settings.trainer.steps
    if settings.buffer.keep_steps:
        steps = min(steps, settings.buffer.keep_steps + settings.checkpoint.every * settings.checkpoint.keep)
    store = steps * trajectories * (TRAJECTORY_BYTES + TOKEN_BYTES * length)
    if settings.buffer.max_store_mb:
        store = min(store, settings.buffer.max_store_mb << 20)
    return store + (settings.checkpoint.keep + 1) * 12 * found.parameters


def judge_memory(found: Estimate, device: str, free_bytes: int) -> Finding:
    """Of one device."""
    check = "memory" if device == "cpu" else f"memory {device}"
    largest = sorted((part for part in found.parts if part.device == device), key=lambda part: -part.bytes)[:3]
    shown = ", ".join(f"{part.name} {megabytes(part.bytes)}" for part in largest)
    needed = found.on(device)
    said = f"about {megabytes(needed)} of {megabytes(free_bytes)} available ({shown})"
    remedy = f"lower {found.what_to_lower(device)}; `async-rl config` shows every part"
    if needed > free_bytes:
        return error(check, said, remedy)
    if needed > MOST_SHARE * free_bytes:
        return warning(check, said, remedy)
    return ok(check, said)
