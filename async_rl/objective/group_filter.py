"""Which trajectories of a group, and which groups, are compared and trained at all (docs/algorithms.md#selection).

Shapes: I trajectories, G groups, n trajectories of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from async_rl.objective.axes import SelectSettings
from async_rl.objective.group_table import GroupTable
from async_rl.objective.tokens import Tokens


def kept_in_groups(tokens: Tokens, reward: Tensor, settings: SelectSettings) -> Tensor:
    """Those that `keep_in_group` keeps, of equal ones the first; all where a group has no more. reward [I] -> [I]
    bool."""
    table = GroupTable.of(tokens, tokens.compared)
    if settings.keep_by == "variance":
        kept = _widest(table, table.spread(reward, torch.inf), settings.keep_in_group)
    else:
        value = tokens.length if settings.keep_by == "shortest" else -reward / tokens.length.clamp(min=1.0)
        kept = table.rank(table.spread(value, torch.inf)) < settings.keep_in_group
    return (table.gather((kept & table.there).double()) > 0) | ~tokens.compared


def _widest(table: GroupTable, reward: Tensor, keep: int) -> Tensor:
    """The i largest and `keep` - i smallest rewards of each row, i such that their variance is largest, of several the
    smallest. reward [G, n], inf where there is none -> [G, n] bool."""
    rank, size = table.rank(reward), table.size
    small = size <= keep
    values = torch.where(table.there, reward, 0.0)
    best, chosen = reward.new_full((len(reward), 1), -1.0), torch.zeros_like(table.there)
    for largest in range(keep + 1):
        taken = ((rank < keep - largest) | (rank >= size - largest)) & table.there
        mean = table.mean(values, taken)
        spread = table.mean((values - mean).square(), taken)
        wider = spread > best + 1e-12
        best, chosen = torch.where(wider, spread, best), torch.where(wider, taken, chosen)
    return chosen | small


def deviating(tokens: Tokens, reward: Tensor, share: float) -> Tensor:
    """Those of the `share` of the groups whose rewards have the largest std; what equals the smallest of them is in.
    reward [I] -> [I] bool."""
    weight = tokens.compared.to(reward.dtype)
    count = tokens.sum_group(weight).clamp(min=1.0)
    mean = tokens.sum_group(reward * weight) / count
    square = tokens.sum_group((reward - mean[tokens.group_of_trajectory]).square() * weight) / count
    if len(square) == 0:
        return tokens.compared
    number = -int(-(share * len(square) - 1e-9) // 1)
    least = square.topk(max(number, 1)).values[-1]
    return (square >= least)[tokens.group_of_trajectory]
