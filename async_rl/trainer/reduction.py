"""Gradients of sharded weights that are formed whole, summed over the ranks one behind the other.

While one is under way (a reduce-scatter: every rank waits for all others in the end, not at once) the next is formed.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

UNDER_WAY = 1
"""gradients that are summed while another is formed: each is held whole"""


class Reduction:
    """Use: `add` each gradient, in the same order on every rank, then `finish`. All are collectives."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[DTensor, Tensor, DTensor]] = deque()

    def add(self, parameter: DTensor, gradient: Tensor) -> None:
        """Begin to sum this rank's `gradient`, of the shape of the whole parameter, over ranks; each adds its rows to
        `.grad`."""
        parts = DTensor.from_local(gradient, parameter.device_mesh, [Partial("sum")], run_check=False)
        rows = parts.redistribute(placements=parameter.placements, async_op=True)
        self._under_way.append((parameter, gradient, rows))
        while len(self._under_way) > UNDER_WAY:
            self._finish_oldest()

    def finish(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        parameter, _, rows = self._under_way.popleft()
        if parameter.grad is None:
            parameter.grad = rows.clone()  # waits
        else:
            parameter.grad += rows
