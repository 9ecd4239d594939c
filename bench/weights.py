"""What it costs to publish and to load a version of the weights, beside a copy of as many bytes. Prints a JSON object.

    python bench/weights.py [--size small|large ...] [--rounds N]
    python bench/weights.py --beside [--tokens N] [--rounds N]

small: the tensors of SmolLM2 (134.5 M parameters), large: 1.0 B parameters (12 GB of memory). float32, one thread,
made-up values. Each round copies and publishes, or copies and loads; figures are medians, as shares of the copy's rate:
1 is as fast as memcpy.

memcpy        the same bytes from one buffer to another
publish       WeightPublisher.publish into shared memory
load          WeightReader.read_into parameters that lie as the trainer's do
load_engine   WeightReader.read_into the embedded engine's parameters (model/fused_decoder.py)
publish_bf16, load_engine_bf16   the same for an engine that computes in bfloat16

--beside: steps of SmolLM2's shape (forward, backward and AdamW over N tokens), each behind a publication into shared
memory: before the step (as with weights that have to be formed first), and beside it (trainer/publication.py). Both in
turn, and which of them comes first too. Seconds a step: wall, processor, and those in which training stood still.
`full` is an optimizer that steps at once, without a forward in between: there the copy is waited for.
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

from async_rl.model.architecture import DecoderConfig
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import Decoder
from async_rl.model.fused_decoder import stack
from async_rl.trainer.publication import Publication
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


class Step:
    """Steps of a model of SmolLM2's shape on made-up tokens."""

    def __init__(self, size: str, tokens: int, path: Path) -> None:
        hidden, inner, layers, query, key, vocabulary = SHAPES[size]
        self.model = Decoder(
            DecoderConfig(
                family="llama",
                vocabulary=vocabulary,
                hidden=hidden,
                intermediate=inner,
                layers=layers,
                heads=query // 64 or 1,
                kv_heads=key // 64 or 1,
                head_dim=min(64, query),
                max_context=4096,
                tied=True,
            )
        )
        self.model.initialise(0)
        self.tokens = torch.randint(vocabulary, (tokens,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        given = {name: p.detach() for name, p in self.model.named_parameters()}
        self.publications = {
            kind: Publication(WeightPublisher(path.with_name(f"{path.name}-{kind}"), given), beside=kind == "beside")
            for kind in ("before", "beside")
        }
        self.version = 0

    def take(self, kind: str, *, forward: bool) -> float:
        """One step; seconds in which nothing was computed for it."""
        publication = self.publications[kind]
        began = time.perf_counter()
        given = sorted((name, p.detach()) for name, p in self.model.named_parameters())
        publication.begin(given, self.version, lambda: None)
        still = time.perf_counter() - began
        self.version += 1
        if forward:
            hidden = self.model(self.tokens, torch.arange(len(self.tokens)), DocumentAttention([len(self.tokens)]))
            (hidden @ self.model.head.t()).logsumexp(-1).mean().backward()
        else:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        began = time.perf_counter()
        publication.before_write()
        still += time.perf_counter() - began
        self.optimizer.step()
        return still

    def close(self) -> None:
        for publication in self.publications.values():
            publication.close()


def measure_beside(size: str, tokens: int, rounds: int, folder: Path) -> dict[str, object]:
    step = Step(size, tokens, folder / f"bench-weights-{os.getpid()}")
    found: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(rounds + 1):
        for forward in (True, False):
            kinds = ("before", "beside") if turn % 2 else ("beside", "before")
            for kind in kinds:
                still = [0.0]

                def one(kind: str = kind, forward: bool = forward, still: list[float] = still) -> None:
                    still[0] = step.take(kind, forward=forward)

                wall, processor = seconds(one)
                if turn:
                    name = f"{kind}{'' if forward else ', full'}"
                    found.setdefault(name, []).append((wall, processor, still[0]))
    step.close()
    return {
        kind: dict(
            zip(
                ("wall", "processor", "still"),
                (round(statistics.median(v), 3) for v in zip(*values, strict=True)),
                strict=True,
            )
        )
        for kind, values in sorted(found.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = shared_folder() or Path(made)
        if arguments.beside:
            size, tokens, rounds = arguments.size[0], arguments.tokens, arguments.rounds
            print(json.dumps(measure_beside(size, tokens, rounds, folder), indent=1))
            return
        print(json.dumps({size: measure(size, arguments.rounds, folder) for size in arguments.size}, indent=1))


if __name__ == "__main__":
    main()
