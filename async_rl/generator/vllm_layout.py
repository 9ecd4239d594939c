"""Where the trainer's tensors lie among those of vLLM's workers. vLLM itself is not needed here.

vLLM stacks some matrices (query, key and value; gate and up) along the first axis. Over several workers it cuts a
matrix along one axis into equal parts, gives small ones (norms) to each whole, and gives each key-value head to several
workers where there are fewer heads than workers. The vocabulary is padded, so its rows are named by vLLM's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from async_rl.weights.blocks import Block

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def find_blocks(
    parameters: Mapping[str, Tensor],
    packing: Mapping[str, Sequence[str]],
    wanted: Shapes,
    *,
    rank: int = 0,
    workers: int = 1,
    vocabulary: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[dict[str, Block], list[str]]:
    """The blocks of the trainer's tensors among the `parameters` of worker `rank` of `workers`.

    Args:
        packing: name of a stacked matrix -> names of its parts, in order (vLLM's `packed_modules_mapping`).
        wanted: the trainer's names and shapes.
        vocabulary: parameter -> (first row, end) of the vocabulary that it holds; the rest of it is padding.

    Returns:
        the blocks, under the trainer's names; and the names of tensors that are here in a form that does not tell
        which block it is. A tensor that is missing or has another shape is in neither.
    """
    blocks: dict[str, Block] = {}
    unclear: list[str] = []
    for name, shape in wanted.items():
        found, stacked = parameters.get(name), False
        if found is None:
            found, stacked = _part(parameters, packing, wanted, name, workers)
        elif vocabulary and name in vocabulary and workers > 1:
            begin, end = vocabulary[name]
            start = (begin, *([0] * (len(shape) - 1)))
            blocks[name] = Block(tensor=found[: end - begin], shape=tuple(shape), start=start)
            continue
        elif workers == 1 and len(shape) and found.shape[0] > shape[0]:
            found = found[: shape[0]]  # the vocabulary is padded
        if found is None:
            unclear += [name] if stacked and workers > 1 else []
            continue
        block = _block(found, tuple(shape), rank, workers)
        if block is not None:
            blocks[name] = block
        elif workers > 1:
            unclear.append(name)
    return blocks, unclear


def _block(tensor: Tensor, shape: tuple[int, ...], rank: int, workers: int) -> Block | None:
    """The block of a tensor of this `shape` that worker `rank` holds; None when its shape does not tell."""
    held = tuple(tensor.shape)
    if len(held) != len(shape):
        return None
    cut = [axis for axis in range(len(shape)) if held[axis] != shape[axis]]
    start = [0] * len(shape)
    if len(cut) > 1:
        return None
    for axis in cut:
        parts, rest = divmod(shape[axis], held[axis]) if held[axis] else (0, 1)
        if rest or parts < 2 or workers % parts:
            return None
        start[axis] = rank // (workers // parts) * held[axis]  # neighbours hold copies
    return Block(tensor=tensor, shape=shape, start=tuple(start))


def _part(
    parameters: Mapping[str, Tensor], packing: Mapping[str, Sequence[str]], wanted: Shapes, name: str, workers: int
) -> tuple[Tensor | None, bool]:
    """(the tensor within the stacked tensor that it is part of, or None; whether there is such a stack)."""
    for packed, parts in packing.items():
        for part in parts:
            if f".{part}." not in name:
                continue
            stack = parameters.get(name.replace(f".{part}.", f".{packed}."))
            rows = [wanted[name.replace(f".{part}.", f".{p}.")][0] for p in parts]
            held = _held_rows(rows, stack.shape[0], workers) if stack is not None else None
            if stack is None or held is None:
                return None, stack is not None
            begin = sum(held[: parts.index(part)])
            return stack[begin : begin + held[parts.index(part)]], True
    return None, False


def _held_rows(rows: Sequence[int], stacked: int, workers: int) -> list[int] | None:
    """How many rows of each part a stack of `stacked` rows holds: all, an equal share of each, or that of the first
    part and a larger share of the others, which several workers hold (key-value heads)."""
    if stacked == sum(rows):
        return list(rows)
    if rows[0] % workers:
        return None
    for shares in range(workers, 0, -1):
        if workers % shares or any(other % shares for other in rows[1:]):
            continue
        held = [rows[0] // workers, *(other // shares for other in rows[1:])]
        if sum(held) == stacked:
            return held
    return None
