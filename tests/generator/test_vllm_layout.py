"""What vLLM's workers can show of the trainer's tensors, whole or split over them; vLLM is not needed."""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.generator.vllm_engine import combined_checksums, unpacked
from async_rl.weights.canary import Evidence, compare, fingerprint

PACKING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def whole() -> dict[str, Tensor]:
    shapes = {
        "embed.weight": (20, 8), "a.q_proj.weight": (8, 8), "a.k_proj.weight": (4, 8), "a.v_proj.weight": (4, 8),
        "a.o_proj.weight": (8, 8), "m.gate_proj.weight": (16, 8), "m.up_proj.weight": (16, 8), "norm.weight": (8,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def worker(tensors: dict[str, Tensor], rank: int, workers: int) -> dict[str, Tensor]:
    """As vLLM holds them: the vocabulary padded to 64 rows, matrices packed and split by rows, o_proj by columns."""

    def rows(*names: str) -> Tensor:
        return torch.cat([tensors[name].chunk(workers)[rank] for name in names])

    padded = torch.cat([tensors["embed.weight"], torch.zeros(44, 8)])
    return {
        "embed.weight": padded.chunk(workers)[rank],
        "a.qkv_proj.weight": rows("a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"),
        "a.o_proj.weight": tensors["a.o_proj.weight"].chunk(workers, 1)[rank],
        "m.gate_up_proj.weight": rows("m.gate_proj.weight", "m.up_proj.weight"),
        "norm.weight": tensors["norm.weight"],
    }


def shown(holders: list[dict[str, Tensor]]) -> Evidence:
    shapes = {name: tuple(tensor.shape) for name, tensor in whole().items()}
    every = []
    for holder in holders:
        held, split = unpacked(holder, PACKING, shapes, len(holders))
        every.append({**fingerprint(held, 0), **dict.fromkeys(split)})
    found = combined_checksums(every)
    digests = {name: digest for name, digest in found.items() if digest is not None}
    return Evidence(version=0, digests=digests, split=[n for n in found if n not in digests], log_probs=())


def differing(found: Evidence) -> tuple[tuple[str, ...], int]:
    comparison = compare(Evidence(version=0, digests=fingerprint(whole(), 0), log_probs=()), found)
    return comparison.tensors, comparison.num_tensors


def test_one_worker_shows_every_tensor() -> None:
    assert differing(shown([worker(whole(), 0, 1)])) == ((), 8)


def test_what_two_workers_share_is_named_and_not_compared() -> None:
    found = shown([worker(whole(), rank, 2) for rank in range(2)])
    assert set(found.split) == whole().keys() - {"norm.weight"}
    assert differing(found) == ((), 1)


def test_a_whole_tensor_that_is_wrong_in_one_of_two_workers_is_different() -> None:
    wrong = {**whole(), "norm.weight": torch.zeros(8)}
    for first, second in ((whole(), wrong), (wrong, whole())):
        found = shown([worker(first, 0, 2), worker(second, 1, 2)])
        assert differing(found) == (("norm.weight",), 1)


def test_what_a_worker_lacks_is_different_with_any_number_of_them() -> None:
    for workers in (1, 2):
        holders = [worker(whole(), rank, workers) for rank in range(workers)]
        del holders[-1]["a.qkv_proj.weight"]
        assert "a.k_proj.weight" in differing(shown(holders))[0]


def test_another_shape_in_one_worker_is_different() -> None:
    held = worker(whole(), 0, 1)
    held["a.o_proj.weight"] = held["a.o_proj.weight"][:, :4]
    assert differing(shown([held]))[0] == ("a.o_proj.weight",)
