"""What follows from a run's settings: the pace, and how its generators lie over GPUs."""

from __future__ import annotations

import re
from math import floor

from async_rl.config.settings import Settings
from async_rl.errors import UserError


def default_window(groups_per_step: int, max_staleness: int, fraction: float) -> int:
    """Window in groups: `fraction` of the slots, within what the bound allows."""
    wanted = floor(fraction * (max_staleness + 1) * groups_per_step)
    return max(1, min(wanted, max_staleness * groups_per_step + 1))


def pace_of(settings: Settings) -> tuple[float, int]:
    """(pipeline depth in batches, window in groups) with the defaults filled in."""
    stale, batch = settings.staleness, settings.batch
    depth = stale.pipeline_depth or stale.max_staleness + 1.0
    return depth, default_window(batch.groups_per_step, stale.max_staleness, stale.window)


def task_limit_s(settings: Settings) -> float:
    """Longest time of a task or reward between two turns, in seconds, with the default filled in."""
    return settings.generator.task_timeout_s or settings.wire.timeout_s / 2


_PART = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def gpus_named(text: str, setting: str) -> tuple[int, ...]:
    """The numbers in `0-3,6`, in order; nothing for an empty text. `setting`: for messages. Raises UserError."""
    if not text.strip():
        return ()
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{setting} is '{text}'; write numbers of GPUs like 0-3 or 0,2")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise UserError(f"{setting} is '{text}', but {first}-{last} runs backwards; write {last}-{first}")
        found += range(first, last + 1)
    twice = sorted({gpu for gpu in found if found.count(gpu) > 1})
    if twice:
        raise UserError(f"{setting} is '{text}': GPU {twice[0]} stands there twice")
    return tuple(found)


def tensor_parallel(settings: Settings) -> int:
    """GPUs of one generator."""
    return settings.vllm.tensor_parallel if settings.generator.engine == "vllm" else 1


def shares_gpus(settings: Settings) -> bool:
    """Whether generators and trainer may be on the same GPU."""
    return settings.trainer.memory_share < 1


def generators_fit(settings: Settings, gpus: int) -> str:
    """Why the run's generators cannot be laid over so many GPUs, or an empty text."""
    count, each = settings.generator.count, tensor_parallel(settings)
    if settings.generator.engine == "vllm":
        if count * each != gpus:
            return (
                f"generator.count={count} with vllm.tensor_parallel={each} needs {count * each} GPUs, not {gpus}; "
                "change one of the three"
            )
    elif count % gpus:
        return f"generator.count={count} cannot be spread evenly over {gpus} GPUs; change one of the two"
    return ""
