"""Is a run too large for this machine? Said before anything starts; and what to lower when it turned out so."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path

from async_rl.errors import UserError
from async_rl.launch.memory import Estimate, checkpoints_layers, estimate, megabytes, read_available
from async_rl.model.folder import read_config
from async_rl.model.footprint import micro_batch_that_fits
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.settings import Settings

STEP = 256
"""tokens by which a micro-batch is proposed"""


def check_room(found: Estimate, sizes: Mapping[str, int], available: int) -> list[str]:
    """`sizes`: bytes of each device, as built; `available`: of main memory, now. Returns notes; raises UserError for
    a model that cannot fit whatever the sizes of batches."""
    notes = []
    for device in found.devices:
        size = sizes.get(device)
        if size is None:
            continue
        where = "main memory" if device == "cpu" else f"the memory of {device}"
        if (held := found.held(device)) > size:
            raise UserError(
                f"the model is too large: {where} is {megabytes(size)}; weights, gradients and optimizer alone take "
                f"about {megabytes(held)}; {_remedy(found, device, size)} (`async-rl config` shows every part)"
            )
        room = min(size, available) if device == "cpu" else size
        if (needed := found.on(device)) > room:
            notes.append(
                f"about {megabytes(needed)} of {where} may be needed, {megabytes(room)} are there; if it runs out, "
                f"lower {found.what_to_lower(device)} (`async-rl config` shows every part)"
            )
    return notes


def _remedy(found: Estimate, device: str, size: int) -> str:
    if device == "cpu":
        count = len({part.name.partition(":")[0] for part in found.parts if part.name.startswith("trainer rank ")})
        held = [part for part in found.parts if part.device == device and not part.lower]
        theirs = sum(part.bytes for part in held if part.name.startswith(("trainer rank ", "trainer: processes")))
        if count and found.held(device) - theirs + theirs // count <= size:
            return "each rank of the trainer takes its own; lower trainer.ranks"
        return "take a smaller model, or fewer generators (generator.count)"
    return (
        "spread it over more GPUs (trainer.ranks with trainer.sharding=full, vllm.tensor_parallel), train adapters "
        "only (lora.rank), or take a smaller model"
    )


def advice(settings: Settings, process: str, tokens: int | None) -> str:
    """What to do about a process that ran out of memory. `tokens`: of the trainer's largest micro-batch, if it was
    training."""
    if not process.startswith("trainer"):
        return (
            "lower generator.max_sequences or generator.max_context"
            + (", or vllm.memory_share where a trainer shares the GPU" if settings.generator.engine == "vllm" else "")
            + "; `async-rl config` shows the estimate"
        )
    trainer = settings.trainer
    had = f"now {trainer.micro_batch_tokens}" + (f", the largest of this step had {tokens}" if tokens else "")
    words = [f"lower trainer.micro_batch_tokens ({had}) to {proposed(settings, tokens)}"]
    exact = requirements(load_recipe(settings.recipe)).per_trajectory_norms  # which keeps layers' inputs anyway
    if not checkpoints_layers(settings) and not exact:
        words.append("set trainer.checkpoint_activations=layer")
    if trainer.sharding == "none" and trainer.ranks > 1:
        words.append("set trainer.sharding=full")
    if settings.generator.engine == "vllm" and trainer.memory_share < 1:
        words.append(f"lower vllm.memory_share (now {settings.vllm.memory_share:g}), which shares the GPU")
    return ", or ".join(words) + "; a resumed run may be given each of them"


def proposed(settings: Settings, tokens: int | None) -> int:
    """Tokens of a micro-batch that should fit: by the estimate for the memory that there is, half of what did not
    fit at most."""
    present = min(settings.trainer.micro_batch_tokens, tokens or settings.trainer.micro_batch_tokens)
    most = max(STEP, present // 2 // STEP * STEP)
    try:
        config = read_config(settings.model.path)
        found = estimate(settings)
    except UserError:
        return most
    if config is None:
        return most
    devices = {part.device for part in found.parts if part.name.startswith("trainer") and "weights" in part.name}
    device = min(devices, default="cpu")
    size = device_sizes(found).get(device)
    if size is None:
        return most
    fits = micro_batch_that_fits(
        config,
        int(size * settings.trainer.memory_share) - found.held(device),
        bfloat16=settings.trainer.dtype == "bfloat16",
        checkpointing=checkpoints_layers(settings),
        sharded=settings.trainer.sharding == "full",
    )
    return max(STEP, min(most, fits))


def device_sizes(found: Estimate) -> dict[str, int]:
    """Bytes of main memory and of each GPU the estimate names that is here."""
    sizes = {"cpu": main_memory()}
    gpus = [device for device in found.devices if device != "cpu"]
    if gpus:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device in gpus:
            if (number := int(device.partition(":")[2] or 0)) < count:
                sizes[device] = torch.cuda.get_device_properties(number).total_memory
    return sizes


def main_memory() -> int:
    """Of this machine, of its container, or what a process may have (ulimit -v)."""
    size = next(
        (int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line), 0
    )
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        size = min(size, int(text))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return size if own == resource.RLIM_INFINITY else min(size, own)


def look_for_room(settings: Settings) -> list[str]:
    """`check_room` of this machine. Raises UserError."""
    found = estimate(settings)
    return check_room(found, device_sizes(found), read_available())
