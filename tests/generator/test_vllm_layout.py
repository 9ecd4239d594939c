"""What vLLM's workers show of the trainer's tensors, whole or split over them; vLLM is not needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from async_rl.generator.vllm_layout import find_blocks
from async_rl.weights.blocks import join, show
from async_rl.weights.canary import Evidence, compare, fingerprint

PACKING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
VERSION = 3
PADDED = 64
"""rows of the vocabulary as vLLM holds it"""


def whole(vocabulary: int = 20) -> dict[str, Tensor]:
    """Eight query heads of two rows, two key-value heads."""
    shapes = {
        "embed.weight": (vocabulary, 8), "a.q_proj.weight": (16, 8), "a.k_proj.weight": (4, 8),
        "a.v_proj.weight": (4, 8), "a.q_proj.bias": (16,), "a.k_proj.bias": (4,), "a.v_proj.bias": (4,),
        "a.o_proj.weight": (8, 16), "m.gate_proj.weight": (32, 8), "m.up_proj.weight": (32, 8), "norm.weight": (8,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def worker(tensors: dict[str, Tensor], rank: int, workers: int) -> dict[str, Tensor]:
    """As vLLM holds them: the vocabulary padded, matrices packed and split by rows, o_proj by columns, key-value heads
    copied where there are more workers than heads."""

    def rows(name: str) -> Tensor:
        parts = min(workers, 2) if ".k_proj." in name or ".v_proj." in name else workers
        return tensors[name].chunk(parts)[rank // (workers // parts)]

    def packed(kind: str) -> Tensor:
        return torch.cat([rows(f"a.{p}_proj.{kind}") for p in "qkv"])

    embed = tensors["embed.weight"]
    padded = torch.cat([embed, torch.zeros(PADDED - len(embed), 8)])
    return {
        "embed.weight": padded.chunk(workers)[rank],
        "a.qkv_proj.weight": packed("weight"),
        "a.qkv_proj.bias": packed("bias"),
        "a.o_proj.weight": tensors["a.o_proj.weight"].chunk(workers, 1)[rank],
        "m.gate_up_proj.weight": torch.cat([rows("m.gate_proj.weight"), rows("m.up_proj.weight")]),
        "norm.weight": tensors["norm.weight"],
    }


def shown(holders: list[dict[str, Tensor]], vocabulary: int = 20) -> Evidence:
    shapes = {name: tuple(tensor.shape) for name, tensor in whole(vocabulary).items()}
    each = PADDED // len(holders)
    every = []
    for rank, holder in enumerate(holders):
        begin = min(rank * each, vocabulary)
        rows = {"embed.weight": (begin, min(begin + each, vocabulary))}
        blocks, unclear = find_blocks(holder, PACKING, shapes, rank=rank, workers=len(holders), vocabulary=rows)
        every.append({**show(blocks, VERSION), **dict.fromkeys(unclear)})
    found = join(every, shapes, VERSION)
    digests = {name: digest for name, digest in found.items() if digest is not None}
    return Evidence(version=VERSION, digests=digests, split=[n for n in found if n not in digests], log_probs=())


def differing(found: Evidence, vocabulary: int = 20) -> tuple[tuple[str, ...], int]:
    digests = fingerprint(whole(vocabulary), VERSION)
    comparison = compare(Evidence(version=VERSION, digests=digests, log_probs=()), found)
    return comparison.tensors, comparison.num_tensors


@pytest.mark.parametrize("vocabulary", [20, 32, 64])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_show_every_tensor_together(workers: int, vocabulary: int) -> None:
    """Their checksums are those of the whole tensors, however these are split."""
    found = shown([worker(whole(vocabulary), rank, workers) for rank in range(workers)], vocabulary)
    assert not found.split
    assert differing(found, vocabulary) == ((), 11)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("name", sorted(whole()))
def test_a_tensor_that_is_old_in_one_worker_is_different(name: str, workers: int) -> None:
    stale = {**whole(), name: whole()[name] + 0.1}
    for old in range(workers):
        found = shown([worker(stale if rank == old else whole(), rank, workers) for rank in range(workers)])
        padding = name == "embed.weight" and old * PADDED // workers >= 20
        assert differing(found) == (() if padding else (name,), 11)


def test_what_a_worker_lacks_is_different_with_any_number_of_them() -> None:
    for workers in (1, 2):
        holders = [worker(whole(), rank, workers) for rank in range(workers)]
        del holders[-1]["a.qkv_proj.weight"]
        assert "a.k_proj.weight" in differing(shown(holders))[0]


def test_another_shape_in_one_worker_is_different() -> None:
    held = worker(whole(), 0, 1)
    held["a.o_proj.weight"] = held["a.o_proj.weight"][:, :4]
    assert differing(shown([held]))[0] == ("a.o_proj.weight",)


def test_a_block_whose_place_is_unknown_is_named_and_not_compared() -> None:
    holders = [worker(whole(), rank, 2) for rank in range(2)]
    for holder in holders:
        holder["a.o_proj.weight"] = holder["a.o_proj.weight"][:5]
    found = shown(holders)
    assert found.split == ["a.o_proj.weight"]
    assert differing(found) == ((), 10)
