"""Checksums of tensors whose blocks lie in several processes, equal to those of the whole tensors.

Each process shows the sampled elements that lie in its block; put together they are the elements that `fingerprint`
samples of the whole tensor. So the trainer need not know how an engine splits its model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from async_rl.weights.canary import bytes_of, checksum, sampled_places

if TYPE_CHECKING:
    from torch import Tensor

Shown = tuple[str, list[int], str]
"""dtype, numbers of the sampled elements that lie in a block, and their bytes in hexadecimal"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one process holds of a tensor."""

    tensor: Tensor
    shape: tuple[int, ...]
    """of the whole tensor"""
    start: tuple[int, ...]
    """place of the block's first element in it"""


def show(blocks: Mapping[str, Block], version: int) -> dict[str, Shown]:
    """The sampled elements of each block. All blocks are on one device."""
    import torch

    places, parts = [], []
    for block in blocks.values():
        shape, start = block.shape or (1,), block.start or (0,)
        tensor = block.tensor.detach().reshape(block.tensor.shape or (1,))
        at = np.stack(np.unravel_index(sampled_places(prod(shape), version), shape)) - np.array(start)[:, None]
        inside = ((at >= 0) & (at < np.array(tensor.shape)[:, None])).all(0)
        local = np.ravel_multi_index(tuple(at[:, inside]), tuple(tensor.shape)) if inside.any() else np.zeros(0, int)
        places.append(np.flatnonzero(inside).tolist())
        parts.append(torch.take(tensor, torch.from_numpy(np.asarray(local, np.int64)).to(tensor.device)))
    return {
        name: (str(block.tensor.dtype), mine, content.hex())
        for (name, block), mine, content in zip(blocks.items(), places, bytes_of(parts), strict=True)
    }


def join(
    shown: Sequence[Mapping[str, Shown | None]], shapes: Mapping[str, Sequence[int]], version: int
) -> dict[str, int | None]:
    """Checksums of the whole tensors from what all processes showed (None: one does not know which block it holds).

    A tensor is left out of which a process has nothing to show, of which processes hold different copies, or of which
    a part is nowhere.
    """
    found: dict[str, int | None] = {}
    for name, shape in shapes.items():
        if not shown or any(name not in process for process in shown):
            continue
        parts = [process[name] for process in shown]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            found[name] = None
            continue
        content = _content(whole, len(sampled_places(prod(shape), version)))
        if content is not None:
            found[name] = checksum(name, shape, whole[0][0], content)
    return found


def _content(parts: Sequence[Shown], count: int) -> bytes | None:
    """The bytes of all sampled elements, in order; None when they do not fit together."""
    elements: dict[int, bytes] = {}
    if len({dtype for dtype, _, _ in parts}) > 1:
        return None
    for _, places, text in parts:
        content = bytes.fromhex(text)
        size = len(content) // max(1, len(places))
        for number, place in enumerate(places):
            element = content[number * size : (number + 1) * size]
            if elements.setdefault(place, element) != element:
                return None
    return b"".join(elements[place] for place in range(count)) if len(elements) == count else None
