"""One forward and backward pass over a batch, with the coefficients formed in between.

Shapes: T policy tokens, I trajectories, G groups of the whole batch, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from async_rl.objective import Coefficients, Columns, ObjectiveState
from async_rl.objective.coefficients import opob_baselines
from async_rl.objective.recipe import Recipe, Requirements
from async_rl.trainer.exact_over_ranks import add_over_ranks
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs, log_probs, own_rows
from async_rl.trainer.packing import PackedBatch
from async_rl.trainer.ranks import Ranks, free, gather_head, is_sharded, sum_gradients, total_norm, whole_log_probs
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model


class Pass:
    """One forward and backward pass over a batch, with the coefficients formed in between.

    A batch that fits one micro-batch costs one forward: its graph is kept until the coefficients are known. A longer
    one is run forward twice (log-probs of the whole batch first, since coefficients may depend on all of it), as
    trainers that recompute old log-probs do anyway.

    Over ranks each runs its share. Log-probs are gathered, so that every rank has the columns of the whole batch and
    finds the same coefficients. Gradients are summed without a division: denominators are the batch's.
    """

    def __init__(
        self,
        model: Model,
        batch: PackedBatch,
        arithmetic: ModelArithmetic,
        needs: Requirements,
        ranks: Ranks,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        """Run the forward; `log_probs` [T] are the result. `parameters`: the model's, as the optimizer knows them."""
        self._model = model
        self._batch = batch
        self._arithmetic = arithmetic
        self._needs = needs
        self._ranks = ranks
        self._parameters = [p for p in parameters if p.requires_grad]
        self._graph: LogProbs | None = None
        self.group_baselines: Tensor | None = None  # [G]
        """exact baselines, known after `backward`"""
        self._exact = TrajectoryGradient(model, arithmetic) if needs.per_trajectory_norms else None
        share = needs.proxy_share
        if len(batch.micro_batches) > 1:
            own = batch_log_probs(model, batch, arithmetic, proxy_share=share)
        elif self._exact is not None:
            own = own_rows(self._exact.forward(batch.micro_batches[0]), batch.micro_batches[0])
        else:
            self._graph = log_probs(model, batch.micro_batches[0], arithmetic, proxy_share=share)
            own = own_rows(self._graph, batch.micro_batches[0])
        self.log_probs = whole_log_probs(own, batch, ranks)

    def clipped_norm(self, answer: Coefficients) -> float | None:
        """Gradient norm of what the trust rule cut away, where the recipe asks for it exactly; call it before
        `backward`."""
        if not self._needs.clipping_bias_norm or answer.clipped is None:
            return None
        own = self._batch.own(answer.clipped)
        return self._norm_over_ranks(own) if self._ranks.size > 1 else self._norm_of(own)

    def backward(
        self, answer: Coefficients, columns: Columns, recipe: Recipe, state: ObjectiveState
    ) -> dict[str, float]:
        """Add the gradient of `answer` to the parameters' `.grad`; metrics of an exact baseline.

        state: the one that `answer` was made with, not the one after it.
        """
        if self._exact is None or answer.baseline is None:
            entropy = None if answer.entropy is None else self._batch.own(answer.entropy)
            self._accumulate(self._batch.own(answer.policy), entropy)
            self._finish()
            return {}

        def baselines(norm_squares: Tensor) -> Tensor:  # [I] -> [G]
            return opob_baselines(norm_squares, columns, recipe, state)

        scope = recipe.opob.scope
        if self._batch.share is None:
            norms = self._exact.add(self._batch, answer.policy, answer.baseline, baselines, scope=scope)
        else:
            norms = add_over_ranks(
                self._exact, self._batch, answer.policy, answer.baseline, baselines, self._ranks, scope=scope
            )
        self._finish()
        self.group_baselines = baselines(norms)
        return {
            "opob/baseline": self.group_baselines.mean().item(),
            "grad/norm_per_trajectory_median": norms.sqrt().median().item(),
            "grad/norm_per_trajectory_max": norms.sqrt().max().item(),
        }

    def _finish(self) -> None:
        """The gradient of this rank's share becomes that of the batch."""
        self._graph = None
        free(self._model)
        sum_gradients(self._parameters, self._ranks)

    def _accumulate(self, policy: Tensor, entropy: Tensor | None) -> None:
        """Add the gradient of -sum_t (policy_t log pi_t + entropy_t H_t) to `.grad`; both [own policy tokens]."""
        for micro in self._batch.micro_batches:
            graph = self._graph or log_probs(self._model, micro, self._arithmetic)
            loss = -(micro.rows(policy).to(graph.log_prob.dtype) * graph.log_prob).sum()
            if entropy is not None:
                loss = loss - (micro.rows(entropy).to(graph.entropy.dtype) * graph.entropy).sum()
            gather_head(self._model)
            loss.backward()

    def _norm_of(self, weights: Tensor) -> float:
        """L2 norm of sum_t weights_t grad log pi_t over all parameters, weights [T]; `.grad` is not touched."""
        total: list[Tensor] | None = None
        for micro in self._batch.micro_batches:
            part = weights[micro.policy]
            if not part.any():
                continue
            graph = self._graph or log_probs(self._model, micro, self._arithmetic)
            value = (part.to(graph.log_prob.dtype) * graph.log_prob).sum()
            found = torch.autograd.grad(value, self._parameters, retain_graph=self._graph is not None)
            total = list(found) if total is None else [a.add_(b) for a, b in zip(total, found, strict=True)]
        return float(torch.nn.utils.get_total_norm(total)) if total is not None else 0.0

    def _norm_over_ranks(self, weights: Tensor) -> float:
        """The same over ranks, weights [own policy tokens], by way of `.grad`, which is empty before and after.

        A kept graph serves the backward pass once more, except for a sharded model, which has freed the weights that
        the graph refers to.
        """
        assert all(p.grad is None for p in self._parameters)
        for micro in self._batch.micro_batches:
            graph = self._graph or log_probs(self._model, micro, self._arithmetic)
            gather_head(self._model)
            value = (micro.rows(weights).to(graph.log_prob.dtype) * graph.log_prob).sum()
            value.backward(retain_graph=self._graph is not None)
        if is_sharded(self._model):
            self._graph = None
        free(self._model)
        sum_gradients(self._parameters, self._ranks)
        found = total_norm([p.grad for p in self._parameters if p.grad is not None])
        norm = float(self._ranks.broadcast_tensor(found))
        for parameter in self._parameters:
            parameter.grad = None
        return norm
