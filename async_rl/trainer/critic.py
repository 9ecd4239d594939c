"""The critic: the value of the state before each policy token, by a head on the policy's features or a model of its
own.

It is trained on the coefficients of the value loss (`Coefficients.value_grad`; docs/algorithms.md#value-loss) with an
optimizer of its own, so that neither learning-rate factors nor the policy's gradient clipping touch it.
Shapes: T policy tokens of the batch, t of a micro-batch.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from async_rl.config import CriticSettings
from async_rl.trainer.forward import ModelArithmetic, hidden_states
from async_rl.trainer.packing import MicroBatch, PackedBatch
from async_rl.trainer.ranks import Ranks, clip_gradient, free, one_rank, sum_gradients, whole_column

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model

CLIP_NORM = 1.0


class Critic:
    """V(state before the token), [T] float32, for every policy token of a batch.

    `kind="head"`: a linear head on the policy's last hidden states, which it reads but does not move.
    `kind="model"`: a copy of the policy's network with such a head, trained throughout (the usual PPO
    critic; twice the memory), or where the policy has adapters, its own adapters on the same frozen
    weights. The value of a turn is that at its first token.

    Over ranks each runs its share; the head is whole on every rank, the trunk as the policy is.
    """

    def __init__(
        self,
        policy: Model,
        settings: CriticSettings,
        arithmetic: ModelArithmetic,
        *,
        ranks: Ranks | None = None,
        trunk: Model | None = None,
    ) -> None:
        """`trunk`: the network of kind="model" where the policy's cannot be copied (sharded)."""
        self._ranks = ranks or one_rank()
        self.warmup_steps = settings.warmup_steps
        self._arithmetic = arithmetic
        self._separate = settings.kind == "model"
        frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.trunk = (trunk or deepcopy(policy, frozen)) if self._separate else policy
        width = policy.head.shape[1]
        self.head = nn.Linear(width, 1, device=policy.head.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._parameters = list(self.head.parameters())
        groups = [list(self.head.parameters())]
        if self._separate:
            # an untied output head takes no part in the value
            trained = [(name, p) for name, p in self.trunk.named_parameters() if p.requires_grad]
            groups.append([p for name, p in trained if not name.startswith("lm_head")])
            self._parameters += groups[-1]
        # Groups, since one operation over many tensors takes no mixture of whole and sharded ones.
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], lr=settings.learning_rate, weight_decay=0.0
        )
        self._batch: PackedBatch | None = None

    @torch.no_grad()
    def values(self, batch: PackedBatch) -> Tensor:
        """Values of the whole batch, [T] float32, detached. `step` then trains on the same batch."""
        self._batch = batch
        own = torch.cat([self._forward(micro)[: 0 if micro.idle else None] for micro in batch.micro_batches])
        self._free()
        return whole_column(own, batch, self._ranks)

    def step(self, value_grad: Tensor) -> float:
        """One optimizer step with d(value loss)/d(value) [T]; returns the gradient's norm."""
        assert self._batch is not None, "values() comes first"
        self.optimizer.zero_grad(set_to_none=True)
        own = self._batch.own(value_grad)
        for micro in self._batch.micro_batches:
            (self._forward(micro) * micro.rows(own)).sum().backward()
        self._free()
        sum_gradients(self._parameters, self._ranks)
        norm = clip_gradient(self._parameters, CLIP_NORM, self._ranks)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's own parameters by name, without the policy's."""
        own = {f"head.{name}": p for name, p in self.head.named_parameters()}
        if self._separate:
            own |= {f"trunk.{name}": p for name, p in self.trunk.named_parameters() if p.requires_grad}
        return own

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters by name, for a checkpoint."""
        return {name: p.detach() for name, p in self.named_parameters().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises KeyError for a missing tensor."""
        with torch.no_grad():
            for name, parameter in self.named_parameters().items():
                parameter.copy_(tensors[name])

    def _free(self) -> None:
        if self._separate:  # the policy's own may be waiting for its backward
            free(self.trunk)

    def _forward(self, micro: MicroBatch) -> Tensor:
        """Values of a micro-batch, [t] float32."""
        if self._separate:
            hidden = hidden_states(self.trunk, micro, self._arithmetic)
        else:
            with torch.no_grad():  # the head reads the policy's features and does not move them
                hidden = hidden_states(self.trunk, micro, self._arithmetic)
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
