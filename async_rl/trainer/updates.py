"""The updates that a step takes on its batch: passes over it, each in minibatches of whole groups.

A minibatch is an optimizer batch of its own: denominators, ESS, whitening and rejections are of it alone. What was
under the weights at the start of the step (`Start`) is computed for the whole batch, before the first update. Which
groups come together is a function of (seed, step, pass, number of groups), so that a replay does the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from async_rl.config.updates import UpdatesSettings
from async_rl.objective import Columns
from async_rl.objective.tokens import LARGEST_LOG_RATIO
from async_rl.trainer.packing import PackedBatch

OF_CRITIC = ("value_before", "value_slow", "turn_values_slow")
"""columns of the critic that stay as they are at the start of a step"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A minibatch, or the whole batch."""

    batch: PackedBatch
    rows: Tensor | None = None  # [its policy tokens] int64
    """which policy tokens of the step's batch; None: all"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Columns of the step's batch under the weights before its first update."""

    log_prob: Tensor  # [T]
    log_reference: Tensor | None  # [T]
    critic: Mapping[str, Tensor] = field(default_factory=dict)  # [T] or [T, 4]
    """`Critic.start_columns`"""
    log_teacher: Tensor | None = None  # [T]
    log_proxy: Tensor | None = None  # [T]

    @staticmethod
    def of(columns: Columns) -> Start:
        """Columns of the whole batch as the first update has them."""
        return Start(
            log_prob=columns.log_prob,
            log_reference=columns.log_reference,
            critic={name: column for name in OF_CRITIC if (column := getattr(columns, name)) is not None},
            log_teacher=columns.log_teacher,
            log_proxy=columns.log_proxy,
        )

    def rows(self, part: Part) -> Start:
        """Those of a minibatch."""
        if part.rows is None:
            return self

        def chosen(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[part.rows]

        return Start(
            log_prob=self.log_prob[part.rows],
            log_reference=chosen(self.log_reference),
            critic={name: column[part.rows] for name, column in self.critic.items()},
            log_teacher=chosen(self.log_teacher),
            log_proxy=chosen(self.log_proxy),
        )


@dataclass(slots=True, kw_only=True)
class Taken:
    """What the updates of a step have come to so far."""

    done: int = 0
    """updates of the weights"""
    left_out: list[str] = field(default_factory=list)
    """why, of each minibatch from which nothing could be learned"""
    stopped: str = ""
    """why no further update is taken; empty: nothing is in its way"""
    kl: float | None = None
    """nats per token, before the newest update, where `updates.kl_stop` measures it"""
    seen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """metrics of each update"""

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.seen[name].append(value)

    def metrics(self, *, several: bool) -> dict[str, float]:
        """Each metric as its mean over the updates that have it, and where there may be several, how many there
        were."""
        found = {name: values[0] if len(values) == 1 else fmean(values) for name, values in self.seen.items()}
        if several:
            found["updates/done"] = float(self.done)
            found["updates/left_out"] = float(len(self.left_out))
        if self.kl is not None:
            found["updates/kl"] = self.kl
        return found


def parts_of(batch: PackedBatch, settings: UpdatesSettings, *, seed: int, step: int, epoch: int) -> Iterator[Part]:
    """The minibatches of a pass, in the order in which they are trained: every group once. Fewer groups than
    `settings.minibatches` make a minibatch each."""
    if settings.minibatches == 1:
        yield Part(batch=batch)
        return
    assert batch.part is not None
    group = batch.group_of_token
    for chosen in partition(batch.num_groups, settings.minibatches, key=(seed, step, epoch)):
        rows = torch.isin(group, torch.tensor(chosen, device=group.device)).nonzero().squeeze(-1)
        if len(rows):
            yield Part(batch=batch.part(chosen), rows=rows)


def partition(groups: int, parts: int, *, key: tuple[int, int, int]) -> list[list[int]]:
    """0..groups-1 in at most `parts` parts whose sizes differ by one at most, none of them empty.

    Their order sorts 64 raw bits each from PCG64, which NumPy keeps the same in all its versions.
    """
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(groups), kind="stable")
    return [part.tolist() for part in np.array_split(order, min(parts, groups))]


def kl_moved(columns: Columns, settings: UpdatesSettings) -> float:
    """KL of the policy that `settings.kl_target` names to the current one: the mean of r - 1 - log r over the tokens,
    with r the ratio of the current one to it (clamped as every ratio is), nats per token. Tokens that are not finite
    do not count."""
    target = columns.log_behaviour if settings.kl_target == "behaviour" else columns.log_proximal
    assert target is not None
    moved = (columns.log_prob.double() - target.double()).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    moved = moved[moved.isfinite()]
    return float((moved.exp() - 1 - moved).mean()) if len(moved) else 0.0
