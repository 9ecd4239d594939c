"""The trainer's step: a packed batch in, weights one version further, and what happened.

`Learner.step` is the story: forward (`Pass`), columns, coefficients, backward (`Pass` again), optimizer. The same
object serves the trainer process, the in-process reference, replays and the lab.

Shapes: T policy tokens, U turns, I trajectories, G groups of the whole batch, on every rank alike. Columns of a batch
are float32, [T]; `own` rows are those of this rank's share.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from async_rl.config import OptimizerSettings
from async_rl.objective import Coefficients, Columns, ObjectiveState
from async_rl.objective.coefficients import finish, objective_of, opob_baselines
from async_rl.objective.recipe import Recipe, Requirements, requirements
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs, log_probs, own_rows
from async_rl.trainer.packing import PackedBatch
from async_rl.trainer.ranks import (
    Ranks,
    clip_gradient,
    free,
    full,
    gather_head,
    is_sharded,
    one_rank,
    sum_gradients,
    total_norm,
    whole_log_probs,
)
from async_rl.trainer.shares import Spread
from async_rl.trainer.trajectory_gradient import TrajectoryGradient, add_over_ranks
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model
    from async_rl.model.lora import Adapters, WithoutAdapters


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerOptions:
    """What the settings say to a learner."""

    steps: int
    """training steps of the whole run, for the schedule"""
    updates_per_batch: int
    optimizer: OptimizerSettings
    arithmetic: ModelArithmetic
    send_adapters: bool = False
    """send the generators only the adapters, where there are some"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One training step."""

    version: int
    """of the weights after the step"""
    skipped: str
    """why the policy was not changed, or empty"""
    seconds: float
    metrics: Mapping[str, float]
    stopped: str = ""
    """why a later update on the batch was not taken, nor those that would have followed it; or empty"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What the first update on a batch would be."""

    skipped: str
    """why there would be none, or empty"""
    gradient: Tensor  # [elements of all trained parameters]
    """of the loss, one parameter after the other, before clipping"""
    coefficients: Tensor  # [T]
    """with an exact baseline subtracted"""
    learning_rate_factor: float
    metrics: Mapping[str, float]
    state: ObjectiveState
    """the objective's state after the update"""


class Learner:
    """Model, optimizer and the objective's running state.

    Over ranks everything here but `version` and `state` is collective: each rank runs its share of a batch, all have
    the columns of the whole batch and take the same step. Decisions that rounding could make differently on two ranks
    (whether a step is skipped, factors of the learning rate) are the leader's.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        options: LearnerOptions,
        *,
        reference: Model | WithoutAdapters | None = None,
        critic: Critic | None = None,
        adapters: Adapters | None = None,
        ranks: Ranks | None = None,
        over: Spread | None = None,
    ) -> None:
        self.ranks = ranks or one_rank()
        self.over = over
        """how a batch is laid over the ranks; None with one"""
        self.model = model
        self._parameters = list(model.parameters())
        self.recipe = recipe
        self.options = options
        self.needs = requirements(recipe)
        self._objective = objective_of(recipe)
        self.reference = reference
        self.critic = critic
        self.adapters = adapters
        self.version = 0
        self.given_up = 0
        """steps by which the version runs ahead of what these weights were trained, since the run went back"""
        self.rate_scale = 1.0
        """factor on the policy's learning rate, since then"""
        self.state = ObjectiveState()
        assert reference is not None or not self.needs.reference, "this recipe needs a reference model"
        assert critic is not None or not self.needs.value, "this recipe needs a critic"
        self.optimizer = make_optimizer(model, options.optimizer)

    def step(self, batch: PackedBatch) -> StepReport:
        """Train on one batch: forward, columns, coefficients, backward, optimizer; `updates_per_batch` times.

        The policy's weights and moments stay as they are when nothing can be learned from the batch. Of several
        updates, those before the first that cannot be taken count.
        """
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        stopped = ""
        done, updates = 0, self.options.updates_per_batch
        start: Columns | None = None  # under the weights before the step's first update
        while done < updates and not stopped:
            pass_ = self._forward(batch)
            columns = self._columns(batch, pass_.log_probs, start)
            start = start or columns
            answer, state = self._agreed(*self._objective(columns, self.recipe, self.state))
            metrics.update(answer.metrics)
            if self.critic is not None and answer.value_grad is not None:
                metrics["critic/grad_norm"] = self.critic.step(answer.value_grad)
            stopped = answer.skip or self._update(pass_, columns, answer, state, metrics)
            done += not stopped
        if updates > 1:
            metrics["updates/done"] = float(done)
        free(self.model)
        self.version += 1
        metrics.update(self._batch_metrics(batch))
        return StepReport(
            version=self.version,
            skipped="" if done else stopped,
            stopped=stopped if done else "",
            seconds=time.perf_counter() - started,
            metrics=metrics,
        )

    def preview(self, batch: PackedBatch) -> Preview:
        """The gradient that `step` would begin with; weights, moments and state stay as they are.

        For one rank only: studies of stored batches run in one process.
        """
        assert self.ranks.size == 1, "a preview is for one rank"
        pass_ = self._forward(batch)
        columns = self._columns(batch, pass_.log_probs, None)
        answer, state = self._objective(columns, self.recipe, self.state)
        self.optimizer.zero_grad(set_to_none=True)
        clipped_norm = pass_.clipped_norm(answer)
        metrics = {**answer.metrics, **pass_.backward(answer, columns, self.recipe, self.state)}
        found = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.trained().values()]
        )
        self.optimizer.zero_grad(set_to_none=True)
        metrics["grad/norm"] = norm = float(torch.linalg.vector_norm(found))
        factors = dict(answer.learning_rate_factors)
        if clipped_norm is not None and math.isfinite(norm):
            more, state, measured = finish(self.recipe, state, gradient_norm=norm, clipped_norm=clipped_norm)
            factors.update(more)
            metrics.update(measured)
        used = answer.policy
        if answer.baseline is not None and pass_.group_baselines is not None:
            of_token = batch.group_of_trajectory[batch.trajectory_of_turn[batch.turn_of_token]]
            used = used - pass_.group_baselines.to(used.dtype)[of_token] * answer.baseline
        return Preview(
            skipped=answer.skip,
            gradient=found,
            coefficients=used,
            learning_rate_factor=math.prod(factors.values()),
            metrics=metrics,
            state=state,
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights by name, detached, of a sharded model this rank's part of each.

        They are copies only where adapters are added to them.
        """
        if self.adapters is not None:
            return dict(self.adapters.weights())
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters, whole, one after another in order of name. Collective: every rank goes through all of them.

        The tensors count on the leader. They are copies only where they are gathered or adapters are added to them.
        """
        if self.adapters is not None:  # every rank has them, and the model, whole
            yield from self.adapters.weights()
            return
        for name, parameter in sorted(self.weights().items()):
            yield name, full(parameter)

    def sent(self) -> dict[str, Tensor]:
        """The tensors that travel to the generators, by name: the weights, or the adapters alone."""
        if self.adapters is not None and self.options.send_adapters:
            return self.adapters.tensors()
        return self.weights()

    @property
    def sent_bytes(self) -> int:
        """Bytes of `sent()`, in the dtypes the tensors have here, without forming them."""
        alone = self.adapters is not None and self.options.send_adapters
        kept = [p for p in self.model.parameters() if self.adapters is None or p.requires_grad == alone]
        return sum(p.numel() * p.element_size() for p in kept)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name: the tensors themselves, not detached."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _forward(self, batch: PackedBatch) -> Pass:
        return Pass(self.model, batch, self.options.arithmetic, self.needs, self.ranks, self._parameters)

    def _agreed(self, answer: Coefficients, state: ObjectiveState) -> tuple[Coefficients, ObjectiveState]:
        """The answer with the leader's decisions in it. Columns may differ by rounding, which does no harm."""
        if self.ranks.size == 1:
            return answer, state
        mine = {"skip": answer.skip, "factors": dict(answer.learning_rate_factors), "state": state.to_dict()}
        led = json.loads(self.ranks.broadcast_bytes(json.dumps(mine).encode()))
        answer = replace(answer, skip=led["skip"], learning_rate_factors=led["factors"])
        return answer, ObjectiveState.from_dict(led["state"])

    def _columns(self, batch: PackedBatch, log_probs: LogProbs, start: Columns | None) -> Columns:
        """The batch under the current weights. `start`: its columns in the step's first update, for later ones."""
        log_prob = log_probs.log_prob.detach()
        reference = value = None
        if self.needs.reference:
            assert self.reference is not None
            if start is None:
                own = batch_log_probs(self.reference, batch, self.options.arithmetic)
                free(self.reference)
                reference = whole_log_probs(own, batch, self.ranks).log_prob
            else:
                reference = start.log_reference
        if self.critic is not None:
            value = self.critic.values(batch)
        return Columns(
            log_prob=log_prob,
            log_behaviour=batch.log_behaviour,
            version=batch.version,
            turn_of_token=batch.turn_of_token,
            trajectory_of_turn=batch.trajectory_of_turn,
            group_of_trajectory=batch.group_of_trajectory,
            reward=batch.reward,
            turn_reward=batch.turn_reward,
            state_key=batch.state_key,
            agent_of_turn=batch.agent_of_turn,
            agents=batch.agents,
            noted=batch.noted,
            truncated=batch.truncated,
            current_version=self.version,
            log_proximal=log_prob if start is None else start.log_prob,
            log_reference=reference,
            value=value,
            value_before=value if start is None else start.value,
            entropy=log_probs.entropy.detach(),
            prob_square_sum=log_probs.prob_square_sum.detach(),
        )

    def _update(
        self,
        pass_: Pass,
        columns: Columns,
        answer: Coefficients,
        state: ObjectiveState,
        metrics: dict[str, float],
    ) -> str:
        """Backward pass and optimizer step. Returns why the step was skipped, or an empty string."""
        settings = self.options.optimizer
        base = base_learning_rate(self.version, steps=self.options.steps, optimizer=settings, given_up=self.given_up)
        if self.critic is not None and self.version - self.given_up < self.critic.warmup_steps:
            self.state = state
            metrics |= {"critic/warmup": 1.0, "lr/base": base, "lr/effective": 0.0}
            return ""
        self.optimizer.zero_grad(set_to_none=True)
        clipped_norm = pass_.clipped_norm(answer)
        metrics.update(pass_.backward(answer, columns, self.recipe, self.state))
        norm = clip_gradient(self._parameters, settings.clip_norm, self.ranks)
        metrics["grad/norm"] = norm
        factors = dict(answer.learning_rate_factors)
        if self.rate_scale != 1.0:
            factors["lr/rollback"] = metrics["lr/rollback"] = self.rate_scale
        if clipped_norm is not None and math.isfinite(norm):
            more, state, measured = finish(self.recipe, state, gradient_norm=norm, clipped_norm=clipped_norm)
            factors.update(more)
            metrics.update(measured)
        factor = math.prod(factors.values())
        if not math.isfinite(norm) or not math.isfinite(factor):
            self.optimizer.zero_grad(set_to_none=True)
            return f"gradient norm {norm} or learning-rate factor {factor} is not finite"
        step_with(self.optimizer, base * factor)
        self.state = state
        metrics |= {"lr/base": base, "lr/effective": base * factor}
        return ""

    def _batch_metrics(self, batch: PackedBatch) -> dict[str, float]:
        return {
            "batch/trajectories": batch.num_trajectories,
            "batch/policy_tokens": batch.num_policy_tokens,
            "batch/tokens": batch.num_tokens,
            "batch/micro_batches": len(batch.micro_batches),
            **({"batch/shared": batch.tokens_spared} if batch.tokens_spared else {}),
            **({} if batch.share is None else {"batch/rank_imbalance": batch.share.imbalance}),
            **({"contexts/mean": batch.num_contexts / batch.num_trajectories} if batch.several_contexts else {}),
        }


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
        if len(batch.micro_batches) > 1:
            own = batch_log_probs(model, batch, arithmetic)
        elif self._exact is not None:
            own = own_rows(self._exact.forward(batch.micro_batches[0]), batch.micro_batches[0])
        else:
            self._graph = log_probs(model, batch.micro_batches[0], arithmetic)
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


def base_learning_rate(step: int, *, steps: int, optimizer: OptimizerSettings, given_up: int = 0) -> float:
    """Learning rate of training step `step` (0-based) of `steps`, before the factors of recipe and batch.

    Warm-up rises linearly and reaches the full rate at step `warmup_steps`; the first step already moves, with
    rate / (warmup_steps + 1). Then the rate is constant, or falls linearly or as a cosine to the end of the run.
    `given_up`: steps that a rollback took back; the warm-up goes on where those weights had been in it.
    """
    peak = optimizer.learning_rate
    if step - given_up < optimizer.warmup_steps:
        return peak * (step - given_up + 1) / (optimizer.warmup_steps + 1)
    span = max(1, steps - optimizer.warmup_steps)
    done = min(1.0, (step - optimizer.warmup_steps) / span)
    match optimizer.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - (1.0 - optimizer.final_share) * done
        case "cosine":
            share = optimizer.final_share + (1.0 - optimizer.final_share) * 0.5 * (1.0 + cos(pi * done))
    return peak * share


def make_optimizer(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as is usual."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
    )


def step_with(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One optimizer step at `learning_rate`. The optimizer's own rate is restored afterwards, so that factors of one
    step never reach the schedule or a checkpoint."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
