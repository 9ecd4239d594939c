"""How much memory a run takes, process by process, and whether this machine has it.

The estimate is made from the shape of the model and the settings. Weights, gradients, moments and what a forward keeps
are counted; the processes themselves, CUDA's contexts and what allocators leave unused are allowances. Peaks of the
parts are added up, so a run usually takes somewhat less.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from async_rl.config import Settings
from async_rl.config.derived import tensor_parallel
from async_rl.errors import UserError
from async_rl.generator.kv_blocks import block_bytes, cache_blocks
from async_rl.model.architecture import (
    DecoderConfig,
    activation_bytes,
    kv_cache_bytes,
    layer_parameters,
    layer_width,
    log_prob_bytes,
    lora_parameters,
    micro_batch_that_fits,
)
from async_rl.model.folder import context_limit, read_config, read_headers
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.run.placement import Machine, Placement, Spot, choose_ways, place
from async_rl.weights.way import LINKS, Way, needs_segment
from async_rl.wire.endpoint import is_tcp

BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = 350 << 20
"""of a process with torch in it, before it does anything"""
VLLM_PROCESS_BYTES = 1500 << 20
"""main memory of vLLM's processes of one generator"""
CONTEXT_BYTES = 800 << 20
"""of a GPU, for CUDA's context and libraries of a process"""
BUFFER_BYTES = 50 << 20
LINK_BYTES = 200 << 20
"""of the sending GPU, for NCCL's own buffers of one link into a vLLM"""
PACKED_BYTES = 256 << 20
"""of each of vLLM's two packing buffers (weights/vllm_links.py), of one link at a time"""
GATHERED_LAYERS = 2
"""whole layers that a rank of a sharded trainer holds at a time: the one at work and the next"""
MOST_IMAGINED = 1024
"""GPUs of a machine that is only imagined"""
STEP = 256
"""tokens; a proposed micro-batch is a multiple of it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One use of memory."""

    name: str
    bytes: int
    device: str
    """cpu, cuda:N"""
    lower: str = ""
    """settings that make it smaller; empty: always there"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    parameters: int
    context: int
    """tokens of the longest sequence; 0: not known"""
    parts: tuple[Part, ...]

    def on(self, device: str) -> int:
        return sum(part.bytes for part in self.parts if part.device == device)

    def held(self, device: str) -> int:
        """What no setting of batch or sequence sizes makes smaller."""
        return sum(part.bytes for part in self.parts if part.device == device and not part.lower)

    def what_to_lower(self, device: str) -> str:
        """Settings, those of the largest part first."""
        parts = sorted((p for p in self.parts if p.device == device and p.lower), key=lambda p: -p.bytes)
        words = dict.fromkeys(word for part in parts for word in part.lower.split(", "))
        return ", ".join(words) or "the size of the model"

    @property
    def devices(self) -> list[str]:
        return sorted({part.device for part in self.parts}, key=lambda d: (d != "cpu", int(d.partition(":")[2] or 0)))


def estimate(settings: Settings) -> Estimate:
    """The estimate for the model in `model.path`. Raises UserError when there is none."""
    folder = Path(settings.model.path)
    config = read_config(folder)
    count = sum(prod(shape) for shape in read_headers(folder).values())
    return estimate_of(settings, parameters=count, config=config, limit=context_limit(folder, config))


def estimate_of(
    settings: Settings,
    *,
    parameters: int,
    config: DecoderConfig | None,
    limit: int = 0,
    placement: Placement | None = None,
) -> Estimate:
    """The estimate for a model of this shape. `config`: None for an architecture that we do not know; activations and
    KV cache are left out then, and `limit` is its context (tokens; 0: not known). `placement`: None takes that of a
    machine with as many GPUs as the settings need."""
    placement = placement or imagined_placement(settings)
    context = settings.generator.max_context or (config.max_context if config is not None else limit)
    shape = _Shape(settings=settings, parameters=parameters, config=config, context=context)
    ways = choose_ways(settings, placement, ipc_works=True)
    parts = [*_host(shape, placement, ways)]
    for rank, spot in enumerate(placement.ranks):
        name = "trainer" if len(placement.ranks) == 1 else f"trainer rank {rank}"
        parts += _trainer(shape, name, _device(spot, settings.trainer.device))
    if linked := set(ways) & set(LINKS):
        sender = _device(placement.ranks[0], settings.trainer.device) if "ipc" in linked else "cpu"
        copy = BYTES[settings.generator.dtype] * parameters
        parts.append(Part(name="trainer: copy of the weights for links into vLLM", bytes=copy, device=sender))
        if sender == "cpu" and ways.count("nccl") > 1:
            parts.append(Part(name="trainer: the same while a generator is frozen", bytes=copy, device=sender))
    if links := ways.count("nccl"):
        sent = _sent_bytes(shape, links)
        gpu = _device(placement.ranks[0], settings.trainer.device)
        parts.append(Part(name="trainer rank 0: weights on their way to vLLM", bytes=sent, device=gpu))
    for number, spot in enumerate(placement.generators):
        parts += _generator(shape, f"generator-{number}", spot, ways[number])
    return Estimate(parameters=parameters, context=context, parts=tuple(parts))


def imagined_placement(settings: Settings) -> Placement:
    """The placement on an imagined machine with just enough GPUs and cores. Raises UserError for settings that no
    machine could follow."""
    gpus = 1
    while True:
        machine = Machine(gpus=tuple(map(str, range(gpus))), cores=tuple(range(4096)))
        try:
            return place(settings, machine, None)
        except UserError:
            if gpus >= MOST_IMAGINED:
                raise
            gpus += 1 if gpus < 16 else gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What the parts are computed from."""

    settings: Settings
    parameters: int
    config: DecoderConfig | None
    context: int

    @property
    def weights(self) -> int:
        """bytes in float32"""
        return 4 * self.parameters

    @property
    def trained(self) -> int:
        """parameters that are trained"""
        lora = self.settings.lora
        if lora.rank == 0 or self.config is None:
            return self.parameters
        return lora_parameters(self.config, lora.rank, tuple(lora.targets))

    @property
    def adapters_alone(self) -> bool:
        """what travels, to be added to a copy of the model there"""
        return bool(self.settings.lora.rank) and self.settings.lora.send == "adapter"

    @property
    def shards(self) -> int:
        """ranks that share one copy of the model"""
        trainer = self.settings.trainer
        return trainer.ranks if trainer.sharding == "full" else 1


def _sent_bytes(shape: _Shape, links: int) -> int:
    """What the sending GPU holds: vLLM packs tensors until a buffer is full, the largest whole, from a copy on the GPU;
    one link packs at a time (weights/link.py). A broadcast has one buffer and one group."""
    largest = shape.parameters if shape.config is None else shape.config.vocabulary * shape.config.hidden
    if shape.settings.weights.broadcast:
        return max(PACKED_BYTES, BYTES[shape.settings.generator.dtype] * largest) + LINK_BYTES
    return 2 * BYTES[shape.settings.generator.dtype] * largest + 2 * PACKED_BYTES + links * LINK_BYTES


def _host(shape: _Shape, placement: Placement, ways: Sequence[Way]) -> Iterator[Part]:
    """Main memory of the run as a whole."""
    settings = shape.settings
    yield Part(name="launcher and buffer", bytes=PROCESS_BYTES // 2 + BUFFER_BYTES, device="cpu")
    yield Part(
        name="buffer: trajectories", bytes=settings.buffer.memory_mb << 20, device="cpu", lower="buffer.memory_mb"
    )
    # of an architecture that is not known, and for what is quantized, the trainer's own (trainer/publish.py)
    cast = (shape.config is not None and settings.generator.quantization == "none") or set(ways) & set(LINKS)
    staged = BYTES[settings.generator.dtype] * shape.parameters if cast else shape.weights
    sent = 4 * shape.trained if shape.adapters_alone else staged
    if needs_segment(ways, tcp=is_tcp(settings.wire.endpoint)):
        yield Part(name="weights in shared memory, two versions", bytes=2 * sent, device="cpu")
    ranks, generators = len(placement.ranks), len(placement.generators)
    if ranks:
        yield Part(name="trainer: processes", bytes=ranks * PROCESS_BYTES, device="cpu")
    if not generators:
        return
    vllm = settings.generator.engine == "vllm"
    each = PROCESS_BYTES + (VLLM_PROCESS_BYTES if vllm else 0)
    yield Part(name="generators: processes", bytes=generators * each, device="cpu", lower="generator.count")
    # out of shared memory vLLM's workers copy themselves
    fetching = sum(way == "stream" or shape.adapters_alone for way in ways if way not in LINKS) if vllm else 0
    if fetching:
        whole = shape.weights if shape.adapters_alone else staged  # the sums are float32
        yield Part(
            name="generators: new weights while they arrive", bytes=fetching * whole, device="cpu",
            lower="generator.count",
        )  # fmt: skip
    if fetching and shape.adapters_alone:
        yield Part(
            name="generators: copies of the model for adapters, at most", bytes=fetching * shape.weights, device="cpu",
            lower="generator.count",
        )  # fmt: skip


def _trainer(shape: _Shape, name: str, device: str) -> Iterator[Part]:
    """One rank."""
    settings, config, shards = shape.settings, shape.config, shape.shards
    trainer, needs = settings.trainer, requirements(load_recipe(settings.recipe))
    trained = 4 * shape.trained
    if device != "cpu":
        yield Part(name=f"{name}: CUDA", bytes=CONTEXT_BYTES, device=device)
    yield Part(name=f"{name}: weights", bytes=shape.weights // shards, device=device)
    yield Part(name=f"{name}: gradients", bytes=trained // shards, device=device)
    if trainer.lanes > 1 and not needs.per_trajectory_norms and shards == 1:
        more = (trainer.lanes - 1) * trained
        yield Part(name=f"{name}: gradients of further lanes", bytes=more, device=device, lower="trainer.lanes")
    yield Part(name=f"{name}: optimizer (AdamW)", bytes=2 * trained // shards, device=device)
    if needs.reference:
        yield Part(name=f"{name}: reference model", bytes=shape.weights // shards, device=device)
    if needs.value and settings.critic.kind == "model":
        copies = 5 if settings.critic.target_average else 4
        yield Part(name=f"{name}: critic with its optimizer", bytes=copies * shape.weights // shards, device=device)
    if needs.per_trajectory_norms and trainer.ranks == 1:  # over ranks none is kept (trainer/exact_over_ranks.py)
        yield Part(name=f"{name}: second gradient (exact OPOB)", bytes=trained // shards, device=device)
    if config is None:
        return
    if needs.per_trajectory_norms and trainer.ranks > 1:
        # that of a layer's matrix is summed over the ranks meanwhile (trainer/reduction.py)
        one = 4 * config.vocabulary * config.hidden + 4 * config.hidden * config.intermediate
        yield Part(name=f"{name}: gradient of the largest weight (exact OPOB)", bytes=one, device=device)
    if shards > 1:
        whole = GATHERED_LAYERS * layer_parameters(config) * BYTES[trainer.dtype]
        yield Part(name=f"{name}: gathered layers", bytes=whole, device=device)
        # trainer/sharding.py: always float32, from the forward to the end of the backward pass. The head's gradient is
        # counted with the log-probs.
        matrix = 4 * config.vocabulary * config.hidden
        both = matrix if config.tied else 2 * matrix
        yield Part(name=f"{name}: embedding and head, whole", bytes=both + matrix, device=device)
    batch = settings.batch.groups_per_step * settings.batch.group_size * (shape.context or trainer.micro_batch_tokens)
    tokens = max(min(trainer.micro_batch_tokens, batch), shape.context)
    kept = activation_bytes(
        config,
        tokens,
        bfloat16=trainer.dtype == "bfloat16",
        checkpointing=checkpoints_layers(settings),
        sharded=shards > 1,
    )
    lower = "trainer.micro_batch_tokens"
    if shape.context > trainer.micro_batch_tokens:  # a longer context has a micro-batch of its own
        lower = "generator.max_context"
    yield Part(name=f"{name}: activations of {tokens} tokens", bytes=kept, device=device, lower=lower)
    if needs.per_trajectory_norms:
        seen = 4 * tokens * layer_width(config)
        yield Part(name=f"{name}: inputs and gradients of a layer (exact OPOB)", bytes=seen, device=device, lower=lower)
    yield Part(name=f"{name}: log-probs", bytes=log_prob_bytes(config, tokens), device=device, lower=lower)


def _generator(shape: _Shape, name: str, spot: Spot, way: Way) -> Iterator[Part]:
    """One generator, whose weights come by `way`; its model may be split over several GPUs."""
    settings, config = shape.settings, shape.config
    generator, split = settings.generator, tensor_parallel(settings)
    devices = [f"cuda:{gpu}" for gpu in spot.gpus] or [generator.device]
    for device in devices:
        if device != "cpu":
            yield Part(name=f"{name}: CUDA", bytes=CONTEXT_BYTES, device=device)
        yield Part(name=f"{name}: weights", bytes=BYTES[generator.dtype] * shape.parameters // split, device=device)
        if generator.engine == "embedded":
            if way != "shared_memory" or shape.adapters_alone:  # from shared memory they are written into their place
                yield Part(name=f"{name}: new weights while they arrive", bytes=shape.weights, device=device)
            if shape.adapters_alone:
                copy = f"{name}: copy of the model for adapters, at most"
                yield Part(name=copy, bytes=shape.weights, device=device)
        if config is None:
            continue
        yield Part(
            name=f"{name}: KV cache of {generator.max_sequences} x {shape.context} tokens, at most",
            bytes=_cache_bytes(shape, config) // split, device=device,
            lower="generator.max_sequences, generator.max_context"
            + (", generator.kv_cache_mb" if generator.engine == "embedded" else ""),
        )  # fmt: skip


def _cache_bytes(shape: _Shape, config: DecoderConfig) -> int:
    """Of the keys and values of one generator."""
    settings, generator = shape.settings, shape.settings.generator
    item = BYTES[generator.dtype]
    if generator.engine == "embedded":
        each = block_bytes(config.layers, config.kv_heads, config.head_dim, item)
        return each * cache_blocks(each, generator.max_sequences, shape.context, generator.kv_cache_mb << 20)
    set_by_hand = (settings.vllm.kv_cache_mb << 20) * tensor_parallel(settings)
    return set_by_hand or kv_cache_bytes(config, generator.max_sequences * shape.context, item)


def checkpoints_layers(settings: Settings) -> bool:
    """Whether the trainer keeps each layer's input alone."""
    return settings.trainer.checkpoint_activations == "layer"


def _device(spot: Spot, asked: str) -> str:
    return f"cuda:{spot.gpus[0]}" if spot.gpus else asked


def read_available() -> int:
    """Bytes of main memory that processes may still take: the machine's, within its container's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            available = int(line.split()[1]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def describe_estimate(found: Estimate) -> str:
    """A table of the parts; devices that hold the same share a block."""
    lines = [f"memory, estimated for {found.parameters:,} parameters:"]
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for device in found.devices:
        rows = tuple((_plain(part.name), part.bytes) for part in found.parts if part.device == device)
        alike.setdefault(rows, []).append(device)
    for rows, devices in alike.items():
        for name in dict.fromkeys(name for name, _ in rows):
            some = [size for other, size in rows if other == name]
            lines.append(f"  {megabytes(sum(some)):>9}  {name}{f' (of {len(some)})' if len(some) > 1 else ''}")
        each = f"each of {', '.join(devices)}" if len(devices) > 1 else devices[0]
        lines.append(f"  {megabytes(found.on(devices[0])):>9}  in all on {each}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    """The name of a part without the number of its process."""
    process, _, part = name.partition(": ")
    kind = next((k for k in ("trainer", "generator") if process.startswith((f"{k} rank", f"{k}-"))), process)
    return f"{kind}: {part}" if part else name


def megabytes(number: float) -> str:
    """Bytes for a person."""
    if number >= 1 << 30:
        return f"{number / 2**30:.1f} GB"
    return f"{number / 2**20:.1f} MB" if number < 10 << 20 else f"{number / 2**20:.0f} MB"


# ------------------------------------------------------------------------------------------------ this machine


def check_room(found: Estimate, sizes: Mapping[str, int], available: int) -> list[str]:
    """Notes on devices that may be too small. `sizes`: bytes of each device, as built; `available`: bytes of main
    memory that are free now. Raises UserError for a model that cannot fit whatever the sizes of batches are."""
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
    """The remedy for a process that ran out of memory. `tokens`: of the trainer's largest micro-batch, if it was
    training."""
    if not process.startswith("trainer"):
        return (
            "lower generator.max_sequences or generator.max_context"
            + (", or vllm.memory_share where a trainer shares the GPU" if settings.generator.engine == "vllm" else "")
            + "; `async-rl config` shows the estimate"
        )
    trainer = settings.trainer
    had = f"now {trainer.micro_batch_tokens}" + (f", the largest of this step had {tokens}" if tokens else "")
    words = [f"lower trainer.micro_batch_tokens ({had}) to {propose_micro_batch(settings, tokens)}"]
    exact = requirements(load_recipe(settings.recipe)).per_trajectory_norms  # which keeps layers' inputs anyway
    if not checkpoints_layers(settings) and not exact:
        words.append("set trainer.checkpoint_activations=layer")
    if trainer.sharding == "none" and trainer.ranks > 1:
        words.append("set trainer.sharding=full")
    if settings.generator.engine == "vllm" and trainer.memory_share < 1:
        words.append(f"lower vllm.memory_share (now {settings.vllm.memory_share:g}), which shares the GPU")
    return ", or ".join(words) + "; a resumed run may be given each of them"


def propose_micro_batch(settings: Settings, tokens: int | None) -> int:
    """A size of micro-batch, in tokens, that should fit: by the estimate for this machine's memory, and at most half of
    what did not fit."""
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
    """Bytes of main memory that a process may have: the least of the machine's, its container's and `ulimit -v`."""
    size = next(
        (int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line), 0
    )
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        size = min(size, int(text))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return size if own == resource.RLIM_INFINITY else min(size, own)


def check_room_here(settings: Settings) -> list[str]:
    """`check_room` with what this machine has. Raises UserError."""
    found = estimate(settings)
    return check_room(found, device_sizes(found), read_available())
