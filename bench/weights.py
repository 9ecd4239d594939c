"""What it costs to publish and to load a version of the weights, beside a copy of as many bytes. Prints a JSON object.

    python bench/weights.py [--size small|large ...] [--rounds N]

small: the tensors of SmolLM2 (134.5 M parameters), large: 1.0 B parameters (12 GB of memory). float32, one thread,
made-up values. Each round copies and publishes, or copies and loads; figures are medians, as shares of the copy's rate:
1 is as fast as memcpy.

memcpy        the same bytes from one buffer to another
publish       WeightPublisher.publish into shared memory
load          WeightReader.read_into parameters that lie as the trainer's do
load_engine   WeightReader.read_into the embedded engine's parameters (model/fused_decoder.py)
publish_bf16, load_engine_bf16   the same for an engine that computes in bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from async_rl.model.fused_decoder import stack
from async_rl.weights.shared_memory import TensorPlace, WeightPublisher, WeightReader, lay_out, shared_folder
from async_rl_kernels import product

SHAPES = {  # hidden, intermediate, layers, query, key and value, vocabulary
    "tiny": (64, 128, 2, 64, 32, 512),
    "small": (576, 1536, 30, 576, 192, 49_152),
    "large": (2048, 8192, 16, 2048, 512, 16_384),
}


def tensors(size: str) -> dict[str, Tensor]:
    hidden, inner, layers, query, key, vocabulary = SHAPES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (out, hidden) for name, out in zip("qkv", (query, key, key))}  # noqa: B905
        shapes |= {f"{at}self_attn.o_proj.weight": (hidden, query), f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


JOINT = (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"), ("self_attn.o",), ("mlp.down",))


def engines(places: Sequence[TensorPlace], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters as the embedded engine has them on this processor: joint, and turned where MKL multiplies."""
    made = {place.name: torch.nn.Parameter(torch.zeros(place.shape, dtype=dtype)) for place in places}
    layers = sorted({name.partition(".self_attn")[0] for name in made if ".self_attn" in name})
    for layer in layers:
        for names in JOINT:
            weights = [made[f"{layer}.{name}_proj.weight"] for name in names]
            stack(weights, turned=product.PREFERS_MKL and dtype == torch.float32)
    return {name: parameter.detach() for name, parameter in made.items()}


def seconds(do: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor."""
    wall, processor = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - wall, time.process_time() - processor


Taken = dict[str, list[tuple[float, float]]]


def beside_copy(taken: Taken, kind: str, num_bytes: int, rounds: int, do: Callable[[int], object]) -> None:
    """`do`, and a copy of a part of the bytes, in turn. The first of each is not counted."""
    source = torch.full((min(num_bytes, 1 << 28) // 4,), 0.5)
    target = torch.zeros_like(source)
    for turn in range(rounds + 1):
        copied = seconds(lambda: target.copy_(source))
        found = seconds(lambda: do(turn))  # noqa: B023
        if turn:
            taken.setdefault("memcpy", []).append((copied[0] / source.nbytes, copied[1] / source.nbytes))
            taken.setdefault(kind, []).append((found[0] / num_bytes, found[1] / num_bytes))


def publish(publisher: WeightPublisher, given: dict[str, Tensor], turn: int) -> None:
    publisher.publish(given, turn + 1)


def load(reader: WeightReader, targets: dict[str, Tensor], _: int) -> None:
    reader.read_into(targets)


def measure(size: str, rounds: int, folder: Path) -> dict[str, object]:
    num_bytes = 0
    taken: Taken = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
        given = tensors(size)
        num_bytes = sum(tensor.nbytes for tensor in given.values())
        path = folder / f"bench-weights-{os.getpid()}"
        with WeightPublisher(path, given, dtype=dtype) as publisher, WeightReader(path) as reader:
            publisher.publish(given, 0)
            beside_copy(taken, f"publish{suffix}", num_bytes, rounds, partial(publish, publisher, given))
            places, _ = lay_out(given, dtype)
            given.clear()
            for kind in ("load", "load_engine") if dtype == torch.float32 else ("load_engine",):
                plain = {place.name: torch.zeros(place.shape, dtype=dtype) for place in places if kind == "load"}
                targets = plain or engines(places, dtype)
                beside_copy(taken, kind + suffix, num_bytes, rounds, partial(load, reader, targets))
                assert all(bool((tensor == 0.5).all()) for tensor in targets.values())
                plain.clear()
                targets.clear()  # memory for one
    middle = {kind: [statistics.median(one) for one in zip(*values, strict=True)] for kind, values in taken.items()}
    copy = middle.pop("memcpy")
    shares = [{kind: round(copy[i] / values[i], 2) for kind, values in middle.items()} for i in (0, 1)]
    return {
        "parameters": num_bytes // 4,
        "memcpy_gb_per_s": round(1e-9 / copy[1], 2),
        "processor_s": {kind: round(values[1] * num_bytes, 3) for kind, values in middle.items()},
        "share_of_memcpy": shares[1],
        "share_of_memcpy_wall": shares[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = shared_folder() or Path(made)
        print(json.dumps({size: measure(size, arguments.rounds, folder) for size in arguments.size}, indent=1))


if __name__ == "__main__":
    main()
