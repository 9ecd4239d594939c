"""The trainer's tensors among those that one of vLLM's workers holds. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def unpacked(
    parameters: Mapping[str, Tensor], packing: Mapping[str, Sequence[str]], wanted: Shapes, workers: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Those held whole, under the trainer's names (`wanted`: shapes by name), and the names of those that this worker
    has a part of only: with `workers` = 1 none. In neither: what it has not at all, or in another shape.

    vLLM stacks some matrices (query, key and value; gate and up) on top of each other: `packing`."""
    held: dict[str, Tensor] = {}
    split: list[str] = []
    for name, shape in wanted.items():
        found = parameters.get(name)
        if found is None:
            found, packed = _part(parameters, packing, wanted, name)
        else:
            packed = found
            if workers == 1 and len(shape) and found.shape[0] > shape[0]:
                found = found[: shape[0]]  # the vocabulary is padded
        if found is not None and tuple(found.shape) == tuple(shape):
            held[name] = found
        elif packed is not None and workers > 1:
            split.append(name)
    return held, split


def _part(
    parameters: Mapping[str, Tensor], packing: Mapping[str, Sequence[str]], wanted: Shapes, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor, where the one it is packed into has it whole, and that one."""
    for packed, parts in packing.items():
        for part in parts:
            if f".{part}." not in name:
                continue
            whole = parameters.get(name.replace(f".{part}.", f".{packed}."))
            sizes = [wanted[name.replace(f".{part}.", f".{p}.")][0] for p in parts]
            if whole is None or whole.shape[0] != sum(sizes):
                return None, whole
            begin = sum(sizes[: parts.index(part)])
            return whole[begin : begin + sizes[parts.index(part)]], whole
    return None, None


def together(shown: Sequence[Mapping[str, int | None]]) -> dict[str, int | None]:
    """Checksums of one engine from those of its workers (None: split over them). Left out: a tensor that a worker
    lacks, or of which workers hold different copies."""
    agreed: dict[str, int | None] = {}
    for name in shown[0] if shown else ():
        if any(name not in worker for worker in shown):
            continue
        found = {worker[name] for worker in shown}
        if None in found or len(found) == 1:
            agreed[name] = None if None in found else found.pop()
    return agreed
