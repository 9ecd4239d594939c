"""From settings to an engine and the source of its weights."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path

import torch

from async_rl.config import Settings
from async_rl.config.derived import shares_gpus
from async_rl.errors import RunFailed, UserError
from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.generator.pull import LinkSource, MergingSource, ReaderSource, TensorReader, WeightSource
from async_rl.generator.thread_share import ThreadShare
from async_rl.model.architecture import DecoderConfig, tensor_shapes
from async_rl.model.decoder import DTYPES, Decoder
from async_rl.model.folder import (
    check_folder,
    check_for_vllm,
    context_limit,
    load_model,
    load_tensors,
    read_headers,
)
from async_rl.model.huggingface import HuggingFaceDecoder
from async_rl.model.tokenizer import Tokenizer
from async_rl.tidying import trim_heap
from async_rl.weights.from_folder import can_read, read_weights
from async_rl.weights.shared_memory import WeightReader
from async_rl.weights.stream import WeightStream
from async_rl.weights.way import LINKS
from async_rl.wire.keys import RelayKeys, keys_in

GPU_BLOCK = 16
"""tokens; vLLM's block on a GPU"""
GPU_RESERVE_BYTES = 3 << 30
"""of a GPU, for what vLLM computes with and for CUDA's context"""
MOST_CPU_CACHE_BYTES = 4 << 30
"""largest KV cache of vLLM on a CPU, which would otherwise take most of the machine's memory"""


def make_weights(
    settings: Settings, segment: Path, endpoint: str, identity: str, *, here: bool, way: str = "", links: str = ""
) -> WeightSource:
    """The source of a generator's weights.

    Args:
        segment: path of the trainer's shared memory.
        endpoint: of the weight server, or of the relay in `weights.relay`; empty when there is none.
        identity: name of this generator.
        here: the segment is, or will be, on this host.
        way: the transport that the launcher chose; empty for a generator that joined, which uses `weights.transport`.
        links: endpoint of the trainer's link server.

    Raises UserError when no transport leads here.
    """
    if way in LINKS:
        timeout_s, workers = settings.weights.timeout_s, settings.vllm.tensor_parallel
        first_s = settings.wire.timeout_s
        return LinkSource(links, identity, way=way, workers=workers, first_s=first_s, timeout_s=timeout_s)
    transport = way or settings.weights.transport
    if transport in LINKS:
        raise UserError(
            f"weights.transport is {transport}, which leads to generators that the run has placed on GPUs itself; here "
            "leave it out, or set weights.transport=shared_memory or stream"
        )
    keys = keys_in(settings.wire.keys)
    if transport == "shared_memory" or (transport == "auto" and here):
        if not here:
            raise UserError(f"weights.transport is shared_memory, but {segment} is not on this host; leave it out")
        return ReaderSource(whole_weights(settings, WeightReader(segment, timeout_s=settings.wire.timeout_s)))
    if not endpoint or keys is None:
        raise UserError(
            "the weights of this run cannot be had here: it has no weight server, which only runs with a tcp endpoint; "
            "start the run with wire.endpoint=tcp://HOST:PORT"
        )
    shown = RelayKeys(keys.folder) if settings.weights.relay else keys
    stream = WeightStream(endpoint, f"{identity}/weights", keys=shown, timeout_s=settings.wire.timeout_s)
    return ReaderSource(whole_weights(settings, stream))


def whole_weights(settings: Settings, source: TensorReader) -> TensorReader:
    """`source`; where only adapters are sent, a reader that adds them to the weights of the model folder."""
    lora, chosen = settings.lora, settings.generator
    if not lora.rank or lora.send == "merged":
        return source
    folder = Path(settings.model.path)
    config = check_folder(folder)
    if config is None:  # the names in its files may differ from those of its parameters
        base = {name: p.detach() for name, p in load_model(folder).named_parameters()}
    else:
        base = {name: tensor for name, tensor in load_tensors(folder).items() if name in tensor_shapes(config)}
    device = chosen.device if chosen.engine == "embedded" else "cpu"
    return MergingSource(source, {name: tensor.to(device) for name, tensor in base.items()}, lora.alpha / lora.rank)


def make_engine(settings: Settings, tokenizer: Tokenizer, *, way: str = "") -> Engine:
    """The engine that `generator.engine` names, with the model of `model.path`. `way`: transport of its weights.
    Raises UserError, or RunFailed when vLLM does not start."""
    chosen = settings.generator
    torch.set_num_threads(max(1, chosen.threads))
    if chosen.engine == "vllm":
        return _make_vllm(settings, way)
    folder = Path(settings.model.path)
    config = check_folder(folder) if chosen.device == "cpu" else None
    if config is None or not can_read(folder):
        return _embedded(settings, tokenizer, load_model(folder, dtype=DTYPES[chosen.dtype], device=chosen.device))
    # The engine lays its weights out anew. They are read into their places there, so that no second copy exists.
    with torch.device("meta"):
        model = Decoder(config)
    engine = _embedded(settings, tokenizer, model.to(DTYPES[chosen.dtype]).to_empty(device="cpu"))
    read_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
    trim_heap()
    return engine


def _embedded(settings: Settings, tokenizer: Tokenizer, model: Decoder | HuggingFaceDecoder) -> EmbeddedEngine:
    chosen = settings.generator
    # without staleness the trainer waits meanwhile, and the same run gives the same bits again
    beside = settings.staleness.max_staleness > 0 and chosen.device == settings.trainer.device == "cpu"
    return EmbeddedEngine(
        model,
        tokenizer,
        max_sequences=chosen.max_sequences,
        max_context=chosen.max_context or None,
        cache_bytes=chosen.kv_cache_mb << 20,
        kv_on_update=chosen.kv_on_update,
        device=chosen.device,
        dtype=DTYPES[chosen.dtype],
        around_step=ThreadShare(most=chosen.threads) if beside and chosen.threads > 1 else None,
    )


def _make_vllm(settings: Settings, way: str) -> Engine:
    from async_rl.generator.vllm_engine import VllmEngine, VllmOptions

    chosen, vllm = settings.generator, settings.vllm
    config = check_folder(settings.model.path)
    check_for_vllm(settings.model.path)
    max_context = chosen.max_context or context_limit(settings.model.path, config)
    if not max_context:
        raise UserError("generator.max_context is not set, and the model's own limit is not known; set it (tokens)")
    cache = vllm.kv_cache_mb << 20
    if not cache and chosen.device == "cpu":  # else vLLM takes most of the machine's memory
        cache = cpu_cache_bytes(config, chosen.max_sequences, max_context, DTYPES[chosen.dtype].itemsize)
    layout = tensor_shapes(config) if config is not None else read_headers(Path(settings.model.path))
    if not cache and chosen.device != "cpu" and shares_gpus(settings):
        parameters = sum(map(prod, layout.values()))
        cache = shared_gpu_cache_bytes(settings, config, max_context, parameters=parameters, total=gpu_bytes())
    return VllmEngine.start(
        VllmOptions(
            model=Path(settings.model.path),
            max_sequences=chosen.max_sequences,
            max_context=max_context,
            dtype=chosen.dtype,
            device=chosen.device,
            kv_on_update=chosen.kv_on_update,
            kv_cache_bytes=cache,
            memory_share=vllm.memory_share,
            tensor_parallel=vllm.tensor_parallel,
            head_dtype=vllm.head_dtype,
            quantization=chosen.quantization,
            speculative=vllm.speculative,
            layout=layout,
            transfer=way if way in LINKS and not (way == "nccl" and settings.weights.broadcast) else "",
        )
    )


def gpu_bytes() -> int:
    """Memory of the first GPU that this process may use. Another process asks: in this one CUDA must not begin before
    vLLM's own have been started. Raises RunFailed. Not run on a GPU."""
    ask = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"the memory of the GPU cannot be read: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return int(done.stdout)


def shared_gpu_cache_bytes(
    settings: Settings, config: DecoderConfig | None, max_context: int, *, parameters: int, total: int
) -> int:
    """Bytes for keys and values on each GPU that a trainer shares: what all sequences in full length take, within what
    `vllm.memory_share` leaves beside the weights. vLLM itself would take what is free when it starts, which depends on
    whether the trainer has started.

    Args:
        parameters: of the model.
        total: bytes of the GPU.

    Raises UserError where that is too little for one sequence, or the sizes of keys and values are not known.
    """
    chosen, vllm = settings.generator, settings.vllm
    if config is None:
        raise UserError(
            "vllm.kv_cache_mb is not set: beside a trainer on the same GPU it must be, and it does not follow from "
            f"{settings.model.path}/config.json; set it"
        )
    item, workers = DTYPES[chosen.dtype].itemsize, vllm.tensor_parallel
    context = -(-max_context // GPU_BLOCK) * GPU_BLOCK * config.kv_width * item // min(workers, config.kv_heads)
    room = int(vllm.memory_share * total) - parameters * item // workers - GPU_RESERVE_BYTES
    if room < context:
        raise UserError(
            f"vllm.memory_share={vllm.memory_share:g} of {total / 1e9:.0f} GB leaves no room for a sequence of "
            f"{max_context} tokens beside the weights; raise it (and lower trainer.memory_share), or lower "
            "generator.max_context"
        )
    return min(room, (chosen.max_sequences + 1) * context)


def cpu_cache_bytes(config: DecoderConfig | None, max_sequences: int, max_context: int, item_bytes: int) -> int:
    """Bytes for the keys and values of so many full sequences and a few blocks, at most MOST_CPU_CACHE_BYTES."""
    if config is None:
        return MOST_CPU_CACHE_BYTES
    token = config.kv_width * item_bytes
    blocks = -(-max_context // 128) * 128  # vLLM's block on a CPU
    return min(MOST_CPU_CACHE_BYTES, max(64 << 20, (max_sequences + 4) * blocks * token))
