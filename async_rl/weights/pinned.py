"""Tensors in pinned main memory, and copies into them from a GPU.

A copy out of a GPU into ordinary memory, with a cast on the way, is staged by the driver and cast by one CPU thread:
10 to 25 s for a model of 7B, by arithmetic. Cast on the GPU and copied into pinned memory it takes what the bus takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_BYTES = 1 << 31
"""of one allocation: torch's allocator of pinned memory rounds each up to a power of two, which would nearly double
what a model takes if each tensor had its own"""
ALIGNED = 256
"""bytes"""


def allocate_pinned(size: int) -> Tensor:
    """`size` bytes of pinned memory."""
    import torch

    return torch.zeros(size, dtype=torch.uint8, pin_memory=True)


def make_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, allocate: Callable[[int], Tensor] = allocate_pinned
) -> dict[str, Tensor]:
    """Tensors of these shapes, views of few blocks, in the order of `shapes`."""
    sizes = [-(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for shape in shapes.values()]
    found: dict[str, Tensor] = {}
    names = list(shapes)
    for numbers in plan_blocks(sizes):
        block, start = allocate(sum(sizes[number] for number in numbers)), 0
        for number in numbers:
            shape = shapes[names[number]]
            part = block[start : start + prod(shape) * dtype.itemsize]
            found[names[number]] = part.view(dtype).view(shape)
            start += sizes[number]
    return {name: found[name] for name in names}


def plan_blocks(sizes: Sequence[int], block: int = BLOCK_BYTES) -> list[list[int]]:
    """Numbers of the tensors in each block of at most `block` bytes (larger tensors have one for themselves): the
    largest first, each into the first block with room for it."""
    blocks: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        place = next((p for p, left in enumerate(room) if left >= sizes[number]), len(blocks))
        if place == len(blocks):
            blocks.append([])
            room.append(block)
        blocks[place].append(number)
        room[place] -= sizes[number]
    return blocks


def pin(address: int, size: int) -> bool:
    """Pin memory that is there already, so that a GPU writes into it without staging. False where CUDA does not do it;
    copies are then as they were. Not run on a GPU."""
    import torch

    portable = 1
    return int(torch.cuda.cudart().cudaHostRegister(address, size, portable)) == 0


def unpin(address: int) -> None:
    """Before the memory that `pin` pinned is given back."""
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)


def wait_for_copies(device: torch.device) -> None:
    """Wait for what the current stream of this GPU has been given until now: the copies alone, since the stream may be
    given more meanwhile, and other threads send on others, one of which may be stuck."""
    import torch

    torch.cuda.current_stream(device).record_event().synchronize()


def copy_over(target: Tensor, source: Tensor) -> None:
    """Copy `source` into a tensor of another dtype or device. From a GPU: cast there, so that no more travels than
    must, and not waited for; the caller synchronises once, behind the last tensor."""
    source = source.detach()
    if source.device == target.device:
        target.copy_(source)
    else:
        target.copy_(source.to(target.dtype), non_blocking=True)
