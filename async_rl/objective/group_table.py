"""The trajectories of a batch as a table with a row for each group.

Shapes: I trajectories, G groups, n the largest number of counted trajectories in a group. Rows are in the order of the
batch; a place without a trajectory is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from async_rl.objective.tokens import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTable:
    """Where each counted trajectory stands."""

    row: Tensor  # [I] int64, its group
    place: Tensor  # [I] int64, how many counted ones of its group stand before it
    counted: Tensor  # [I] bool
    there: Tensor  # [G, n] bool: a trajectory is there

    @staticmethod
    def of(tokens: Tokens, counted: Tensor) -> GroupTable:
        """counted [I] bool: those that are in the table."""
        row = tokens.group_of_trajectory
        size = torch.zeros(tokens.num_groups, dtype=torch.int64, device=row.device)
        size.index_add_(0, row, counted.long())
        before = counted.long().cumsum(0) - counted.long()
        place = before - (size.cumsum(0) - size)[row] if len(row) else row
        columns = int(size.max()) if len(size) else 0
        there = torch.arange(columns, device=row.device) < size[:, None]
        return GroupTable(row=row, place=place, counted=counted, there=there)

    @property
    def size(self) -> Tensor:  # [G, 1]
        return self.there.sum(1, keepdim=True)

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[I] -> [G, n], `fill` where there is no trajectory."""
        table = values.new_full(self.there.shape, fill)
        table[self.row[self.counted], self.place[self.counted]] = values[self.counted]
        return table

    def gather(self, table: Tensor) -> Tensor:
        """[G, n] -> [I], 0 where a trajectory is not in the table."""
        values = table.new_zeros(len(self.row))
        values[self.counted] = table[self.row[self.counted], self.place[self.counted]]
        return values

    def mean(self, table: Tensor, among: Tensor) -> Tensor:
        """Mean of `table` [G, n] over `among` [G, n] bool, 0 where there is none. [G, 1]"""
        return (table * among).sum(1, keepdim=True) / among.sum(1, keepdim=True).clamp(min=1)

    def rank(self, table: Tensor) -> Tensor:
        """How many of the row are smaller, or alike and before it: [G, n] -> [G, n] int64. Fill with inf."""
        return table.argsort(dim=1, stable=True).argsort(dim=1)
