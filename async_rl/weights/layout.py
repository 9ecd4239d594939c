"""Where each tensor of a set of weights lies among its bytes, in one buffer, whatever carries it."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALIGN = 64
ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one tensor lies in a buffer."""

    name: str
    dtype: str
    """as torch names it, e.g. "bfloat16" """
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of the buffer"""

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * ITEM_BYTES[self.dtype]


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[list[Slot], int]:
    """The slots and the bytes of one buffer. Raises ValueError for a dtype that cannot be carried."""
    slots, end = [], 1
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise ValueError(f"{name}: weights of dtype {dtype} cannot be published")
        slot = Slot(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=aligned(end, ALIGN))
        slots.append(slot)
        end = slot.end
    return slots, aligned(end, mmap.PAGESIZE)


def in_text(slots: Sequence[Slot]) -> str:
    """As JSON."""
    return json.dumps([[s.name, s.dtype, s.shape, s.offset] for s in slots])


def from_text(text: str | bytes, buffer_bytes: int) -> list[Slot]:
    """The slots of such a text. Raises ValueError when it is none, or they do not fit into the buffer."""
    try:
        slots = [
            Slot(name=str(name), dtype=dtype, shape=tuple(int(n) for n in shape), offset=int(offset))
            for name, dtype, shape, offset in json.loads(text)
        ]
        fits = all(
            0 <= slot.offset <= slot.end <= buffer_bytes and min(slot.shape, default=0) >= 0 for slot in slots
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"damaged: {error}") from None
    if not fits:
        raise ValueError("truncated or damaged: a tensor lies outside its buffer")
    return slots


def tensor_of(whole: Tensor, slot: Slot) -> Tensor:
    """The tensor of one slot as a view of its buffer's bytes."""
    import torch

    return whole[slot.offset : slot.end].view(getattr(torch, slot.dtype)).view(slot.shape)


def aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to
