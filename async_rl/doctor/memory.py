"""How much memory a run takes, from the shape of its model and its settings. An estimate: a tenth off is usual."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from async_rl.doctor.finding import Finding, error, megabytes, ok, warning
from async_rl.model.architecture import DecoderConfig, context_of
from async_rl.model.folder import read_config, read_headers
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.settings import Settings

BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = 350 << 20
"""of a process with torch in it, before it does anything"""
BUFFER_BYTES = 50 << 20
MOST_SHARE = 0.9
"""of what is there; the system and the caches of files need the rest"""
TRAJECTORY_BYTES, TOKEN_BYTES = 400, 9
"""in the store"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One use of memory."""

    name: str
    bytes: int
    device: str
    """cpu, cuda:N"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    parameters: int
    context: int
    """tokens of the longest sequence; 0: not known"""
    parts: tuple[Part, ...]

    def on(self, device: str) -> int:
        return sum(part.bytes for part in self.parts if part.device == device)

    @property
    def devices(self) -> list[str]:
        return sorted({part.device for part in self.parts})


def estimate(settings: Settings) -> Estimate:
    """Of the model in `model.path`. Raises UserError when there is none."""
    folder = Path(settings.model.path)
    config = read_config(folder)
    parameters = sum(prod(shape) for shape in read_headers(folder).values())
    return estimate_of(settings, parameters=parameters, config=config)


def estimate_of(settings: Settings, *, parameters: int, config: DecoderConfig | None) -> Estimate:
    """`config`: None when the architecture is not one we know; activations and KV cache are left out then."""
    chosen, generator = settings.trainer, settings.generator
    needs = requirements(load_recipe(settings.recipe))
    trainer, engine = _device(chosen.device), _device(generator.device)
    weights = 4 * parameters
    parts = [
        Part(name="trainer: process", bytes=PROCESS_BYTES, device="cpu"),
        Part(name="trainer: weights and gradients", bytes=2 * weights, device=trainer),
        Part(name="trainer: optimizer (AdamW)", bytes=2 * weights, device=trainer),
        Part(name="generators: processes", bytes=generator.count * PROCESS_BYTES, device="cpu"),
        Part(
            name="generators: weights, and new ones while they arrive",
            bytes=generator.count * (BYTES[generator.dtype] * parameters + weights),
            device=engine,
        ),
        Part(name="weights in shared memory, two versions", bytes=2 * weights, device="cpu"),
        Part(name="buffer", bytes=BUFFER_BYTES + (settings.buffer.memory_mb << 20), device="cpu"),
    ]
    if needs.reference:
        parts.append(Part(name="trainer: reference model", bytes=weights, device=trainer))
    if needs.value and settings.critic.kind == "model":
        parts.append(Part(name="trainer: critic with its optimizer", bytes=4 * weights, device=trainer))
    context = context_of(generator.max_context, config)
    if config is not None:
        tokens = max(chosen.micro_batch_tokens, context)
        parts.append(
            Part(
                name=f"trainer: activations of {tokens} tokens",
                bytes=tokens * activation_bytes(config, BYTES[chosen.dtype]),
                device=trainer,
            )
        )
        cache = generator.max_sequences * context * config.kv_width * BYTES[generator.dtype]
        if settings.vllm.kv_cache_mb:
            cache = settings.vllm.kv_cache_mb << 20
        parts.append(
            Part(
                name=f"generators: KV cache of {generator.max_sequences} x {context} tokens, at most",
                bytes=generator.count * cache,
                device=engine,
            )
        )
    return Estimate(parameters=parameters, context=context, parts=tuple(parts))


def activation_bytes(c: DecoderConfig, item_bytes: int) -> int:
    """Kept for the backward pass, a token: in each layer the two normed inputs and the residuals, queries, keys,
    values and the attention's output (rotated ones beside the plain), gate, up, their activation and product."""
    layer = 6 * c.hidden + 3 * c.heads * c.head_dim + 3 * c.kv_heads * c.head_dim + 4 * c.intermediate
    return item_bytes * (c.layers * layer + 2 * c.hidden)


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
    remedy = (
        "lower trainer.micro_batch_tokens, generator.max_sequences or generator.max_context, or generator.count; "
        "`async-rl config` shows every part"
    )
    if needed > free_bytes:
        return error(check, said, remedy)
    if needed > MOST_SHARE * free_bytes:
        return warning(check, said, remedy)
    return ok(check, said)


def read_available() -> int:
    """Bytes of main memory that processes may still take: the machine's, cut by a container's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            available = int(line.split()[1]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def in_words(found: Estimate) -> str:
    """A table of the parts."""
    lines = [f"memory, estimated for {found.parameters:,} parameters:"]
    for device in found.devices:
        lines += [f"  {megabytes(part.bytes):>9}  {part.name}" for part in found.parts if part.device == device]
        lines.append(f"  {megabytes(found.on(device)):>9}  in all on {device}")
    return "\n".join(lines)


def _device(name: str) -> str:
    return "cuda:0" if name == "cuda" else name
