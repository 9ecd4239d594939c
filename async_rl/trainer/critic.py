"""The critic: the value of the state before each policy token, by a head on the policy's features or a model of its
own; with Q heads of a turn, too.

It is trained on the coefficients of the value loss (`Coefficients.value_grad`; docs/algorithms.md#value-loss) with an
optimizer of its own, so that neither learning-rate factors nor the policy's gradient clipping touch it.
Shapes: T policy tokens of the batch, t of a micro-batch; h outputs of the head: 1, the bins of a distribution, or the
four of `returns.HEADS`.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from async_rl.config import CriticSettings
from async_rl.objective.returns import HEADS
from async_rl.trainer.distribution import Distribution
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.packing import MicroBatch, PackedBatch
from async_rl.trainer.ranks import Ranks, clip_gradient, free, one_rank, sum_gradients, whole_column

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model

CLIP_NORM = 1.0
DOUBLED_STD = 0.02
"""of the first weights of Q heads: two that begin alike would stay alike"""


class Critic:
    """V(state before the token), [T] float32, for every policy token of a batch.

    `kind="head"`: a linear head on the policy's last hidden states, which it reads but does not move.
    `kind="model"`: a copy of the policy's network with such a head, trained throughout (the usual PPO
    critic; twice the memory), or where the policy has adapters, its own adapters on the same frozen
    weights. The value of a turn is that at its first token, its Q that behind its last.

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
        slow_trunk: Model | None = None,
        turn_q: bool = False,
        median: bool = False,
    ) -> None:
        """`trunk`, `slow_trunk`: the networks of kind="model", and of its target network, where the policy's cannot be
        copied (sharded). `turn_q`: with Q heads. `median`: with one for the median of the return beside the value."""
        self._ranks = ranks or one_rank()
        self.warmup_steps, self.epochs = settings.warmup_steps, settings.epochs
        self.frozen = settings.learning_rate == 0
        self._arithmetic = arithmetic
        self._separate = settings.kind == "model"
        self._turn_q, self._median = turn_q, median
        self._distribution = None if settings.loss == "squared" else Distribution.of(settings)
        frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
        self.trunk = (trunk or deepcopy(policy, dict(frozen))) if self._separate else policy
        self.head = self._make_head(policy)
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
        self._average = settings.target_average
        self._slow_trunk, self._slow_head = self.trunk, self.head
        if self._average:
            self._slow_head = deepcopy(self.head).requires_grad_(False)
            if self._separate:
                self._slow_trunk = slow_trunk or deepcopy(self.trunk, dict(frozen))
                self._slow_trunk.requires_grad_(False)
        self._batch: PackedBatch | None = None

    def columns(self, batch: PackedBatch) -> dict[str, Tensor]:
        """The critic's columns of the whole batch by their names in `Columns`, detached. `step` then trains on the same
        batch."""
        self._batch = batch
        found = self._outputs(batch, self.trunk, self.head)
        if self._median:
            return {"value": found[:, 0].contiguous(), "median": found[:, 1].contiguous()}
        return {self._column: found}

    def values(self, batch: PackedBatch) -> Tensor:
        """`columns` as one, [T] float32, or [T, 4] with Q heads."""
        return self.columns(batch)[self._column]

    def start_columns(self, batch: PackedBatch, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stays as it is at the start of a step: values there, and those of the target network. `now`:
        `columns(batch)`."""
        held = {} if self._turn_q else {"value_before": now[self._column]}
        if self._average:
            slow = self._outputs(batch, self._slow_trunk, self._slow_head)
            slow = slow[:, 0].contiguous() if self._median else slow
        elif self._turn_q:
            slow = now[self._column]
        else:
            return held
        return held | {f"{self._column}_slow": slow}

    def step(
        self,
        value_grad: Tensor,
        target: Tensor | None = None,
        share: Tensor | None = None,
        earlier: tuple[PackedBatch, Tensor] | None = None,
    ) -> dict[str, float]:
        """One optimizer step with d(value loss)/d(value), [T], with Q heads [T, 4], with a median [T, 2]; metrics.

        target, share [T]: of a critic that is a distribution, which is trained on sum share * cross-entropy instead.
        earlier: a further batch, with the targets [E] of its tokens, which count in the mean as the batch's own do.
        """
        if self.frozen:
            return {}
        assert self._batch is not None, "columns() comes first"
        metrics: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        if earlier is not None:
            assert share is not None
            more = len(earlier[1])
            every = int((share > 0).sum()) + more
            value_grad, share = value_grad * (1 - more / every), share * (1 - more / every)
            self._train_on(*earlier, 1 / every)
            metrics["critic/earlier"] = more / every
        if self._distribution is None:
            own = self._batch.own(value_grad)
            for micro in self._batch.micro_batches:
                (self._forward(micro, self.trunk, self.head) * micro.rows(own)).sum().backward()
        else:
            assert target is not None
            assert share is not None
            metrics["critic/outside"] = self._distribution.outside(target[share > 0])
            target, share = self._batch.own(target), self._batch.own(share)
            for micro in self._batch.micro_batches:
                logits = self._logits(micro, self.trunk, self.head)
                self._distribution.loss(logits, micro.rows(target), micro.rows(share)).backward()
        self._free()
        sum_gradients(self._parameters, self._ranks)
        metrics["critic/grad_norm"] = norm = clip_gradient(self._parameters, CLIP_NORM, self._ranks)
        if math.isfinite(norm):
            self.optimizer.step()
            self._follow(self._average)
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _train_on(self, batch: PackedBatch, target: Tensor, share: float) -> None:
        """Add the gradient of the loss of these tokens, each with this share in the mean. target [E]."""
        target = batch.own(target)
        for micro in batch.micro_batches:
            wanted, weight = micro.rows(target), torch.full_like(micro.rows(target), 0.0 if micro.idle else share)
            logits = self._logits(micro, self.trunk, self.head)
            if self._distribution is not None:
                self._distribution.loss(logits, wanted, weight).backward()
            else:
                (0.5 * weight * (logits.squeeze(-1) - wanted).square()).sum().backward()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's own parameters by name, without the policy's; those of the target network begin with `slow_`."""
        networks = [("head", self.head), *([("trunk", self.trunk)] if self._separate else [])]
        own = {f"{n}.{name}": p for n, net in networks for name, p in net.named_parameters() if p.requires_grad}
        if not self._average:
            return own
        slow = {"head": dict(self._slow_head.named_parameters()), "trunk": dict(self._slow_trunk.named_parameters())}
        return own | {f"slow_{path}": slow[path.partition(".")[0]][path.partition(".")[2]] for path in own}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters by name, for a checkpoint."""
        return {name: p.detach() for name, p in self.named_parameters().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises KeyError for a missing tensor."""
        with torch.no_grad():
            for name, parameter in self.named_parameters().items():
                parameter.copy_(tensors[name])

    @property
    def _column(self) -> str:
        return "turn_values" if self._turn_q else "value"

    def _make_head(self, policy: Model) -> nn.Linear:
        outputs = len(HEADS) if self._turn_q else 1 if self._distribution is None else self._distribution.bins
        outputs = 2 if self._median else outputs
        head = nn.Linear(policy.head.shape[1], outputs, device=policy.head.device)
        if self._turn_q:
            nn.init.normal_(head.weight, std=DOUBLED_STD)
            self._ranks.broadcast_tensor(head.weight.data)
        else:
            nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def begin_target(self) -> None:
        """The target network becomes the critic."""
        self._follow(0.0)

    @torch.no_grad()
    def _follow(self, average: float) -> None:
        """The target network is this share of itself and the rest of the critic. Elementwise, so that each rank moves
        its part."""
        every = self.named_parameters()
        for name, parameter in every.items():
            if self._average and not name.startswith("slow_"):
                every[f"slow_{name}"].mul_(average).add_(parameter, alpha=1 - average)

    def _free(self) -> None:
        if self._separate:  # the policy's own may be waiting for its backward
            free(self.trunk)
            free(self._slow_trunk)

    @torch.no_grad()
    def _outputs(self, batch: PackedBatch, trunk: Model, head: nn.Linear) -> Tensor:
        """Values of the whole batch, [T] or [T, 4] float32."""
        own = torch.cat(
            [self._forward(micro, trunk, head)[: 0 if micro.idle else None] for micro in batch.micro_batches]
        )
        self._free()
        return whole_column(own, batch, self._ranks)

    def _forward(self, micro: MicroBatch, trunk: Model, head: nn.Linear) -> Tensor:
        """Values of a micro-batch, [t] or [t, 4] float32."""
        outputs = self._logits(micro, trunk, head)
        if self._distribution is not None:
            return self._distribution.mean(outputs)
        return outputs if self._turn_q or self._median else outputs.squeeze(-1)

    def _logits(self, micro: MicroBatch, trunk: Model, head: nn.Linear) -> Tensor:
        """What the head answers, [t, h] float32; of Q heads those of the state before a token, then those behind it."""
        if trunk is not self.trunk or self._separate:
            hidden = self._hidden(micro, trunk)
        else:
            with torch.no_grad():  # the head reads the policy's features and does not move them
                hidden = self._hidden(micro, trunk)
        outputs: Tensor = head(hidden.to(head.weight.dtype))
        if not self._turn_q:
            return outputs
        before, behind = outputs.split(len(micro.targets))
        return torch.cat([before[:, :2], behind[:, 2:]], 1)

    def _hidden(self, micro: MicroBatch, trunk: Model) -> Tensor:
        """Hidden states before each policy token, [t, H]; with Q heads those behind them after them, [2t, H]."""
        with self._arithmetic.autocast(micro.tokens.device):
            attention = micro.attention(self._arithmetic.kernel)
            if not self._turn_q:
                return micro.of_policy(trunk(micro.tokens, micro.positions, attention, micro.predicting))
            rows = torch.cat([micro.predictors, micro.sampled])
            found: Tensor = trunk(micro.tokens, micro.positions, attention, rows)
            return found
