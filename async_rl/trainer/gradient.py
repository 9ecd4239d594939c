"""From coefficients to gradients, over micro-batches.

A batch that fits one micro-batch costs one forward: its graph is kept until the coefficients are known.
A longer one is run twice forward (log-probs of the whole batch first, since coefficients may depend on
all of it), as trainers that recompute old log-probs do anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from async_rl.batch import PackedBatch
from async_rl.objective import Coefficients, Columns
from async_rl.objective.coefficients import opob_baselines
from async_rl.objective.recipe import Recipe, Requirements
from async_rl.trainer.forward import Arithmetic, batch_log_probs, log_probs
from async_rl.trainer.trajectory_gradient import TrajectoryGradient
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from async_rl.trainer.forward import Model


class Pass:
    """Forward at construction, backward when the coefficients are there."""

    def __init__(self, model: Model, batch: PackedBatch, arithmetic: Arithmetic, needs: Requirements) -> None:
        self._model = model
        self._batch = batch
        self._arithmetic = arithmetic
        self._needs = needs
        self._graph: LogProbs | None = None
        self.group_baselines: Tensor | None = None  # [groups]
        """an exact baseline, after `backward`"""
        self._exact = TrajectoryGradient(model, arithmetic) if needs.per_trajectory_norms else None
        if len(batch.micro_batches) > 1:
            self.log_probs = batch_log_probs(model, batch, arithmetic)
        elif self._exact is not None:
            self.log_probs = self._exact.forward(batch.micro_batches[0])
        else:
            self._graph = log_probs(model, batch.micro_batches[0], arithmetic)
            self.log_probs = self._graph

    def clipped_norm(self, answer: Coefficients) -> float | None:
        """Gradient norm of what the trust rule cut away, where the recipe asks for it exactly. Call it
        before `backward`."""
        if not self._needs.clipping_bias_norm or answer.clipped is None:
            return None
        return self._norm_of(answer.clipped)

    def backward(self, answer: Coefficients, columns: Columns, recipe: Recipe) -> dict[str, float]:
        """Add the gradient of `answer` to the parameters' `.grad`; metrics of an exact baseline."""
        if self._exact is None or answer.baseline is None:
            self._accumulate(answer.policy, answer.entropy)
            return {}

        def baselines(norm_squares: Tensor) -> Tensor:
            return opob_baselines(norm_squares, columns, recipe)

        norms = self._exact.add(
            self._batch, answer.policy, answer.baseline, baselines, scope=recipe.opob.scope
        )
        self.group_baselines = baselines(norms)
        return {
            "opob/baseline": self.group_baselines.mean().item(),
            "grad/norm_per_trajectory_median": norms.sqrt().median().item(),
            "grad/norm_per_trajectory_max": norms.sqrt().max().item(),
        }

    def _accumulate(self, policy: Tensor, entropy: Tensor | None) -> None:
        for micro in self._batch.micro_batches:
            graph = self._graph or log_probs(self._model, micro, self._arithmetic)
            loss = -(policy[micro.policy].to(graph.log_prob.dtype) * graph.log_prob).sum()
            if entropy is not None:
                loss = loss - (entropy[micro.policy].to(graph.entropy.dtype) * graph.entropy).sum()
            loss.backward()
        self._graph = None

    def _norm_of(self, weights: Tensor) -> float:
        """L2 norm of sum_t weights[t] grad log pi_t over all parameters, leaving `.grad` alone."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        total: list[Tensor] | None = None
        for micro in self._batch.micro_batches:
            part = weights[micro.policy]
            if not part.any():
                continue
            graph = self._graph or log_probs(self._model, micro, self._arithmetic)
            value = (part.to(graph.log_prob.dtype) * graph.log_prob).sum()
            found = torch.autograd.grad(value, parameters, retain_graph=self._graph is not None)
            total = list(found) if total is None else [a.add_(b) for a, b in zip(total, found, strict=True)]
        return float(torch.nn.utils.get_total_norm(total)) if total is not None else 0.0
