"""The trainer's step: a packed batch in, weights one version further, and what happened.

The same object serves the trainer process, the in-process reference and the lab.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from async_rl.config import OptimizerSettings
from async_rl.objective import Coefficients, Columns, ObjectiveState
from async_rl.objective.coefficients import finish, objective_of
from async_rl.objective.recipe import Recipe, requirements
from async_rl.trainer import gradient
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import Arithmetic, batch_log_probs
from async_rl.trainer.packing import PackedBatch, Spread
from async_rl.trainer.ranks import Ranks, clip_gradient, full, one_rank, whole_log_probs
from async_rl.trainer.sharding import free
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model
    from async_rl.model.lora import Adapters, WithoutAdapters


# -------------------- schedule
# The learning rate before a recipe's factors: warm-up, then constant, linear or cosine.


def base_learning_rate(step: int, *, steps: int, optimizer: OptimizerSettings, given_up: int = 0) -> float:
    """Learning rate of training step `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches the full rate at step `warmup_steps`; the first step already
    moves (rate / (warmup_steps + 1)). `given_up`: steps that a rollback took back: the warm-up goes on where
    those weights had been in it, what follows it ends with the run.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerOptions:
    """What a learner is told."""

    steps: int
    """training steps of the whole run, for the schedule"""
    updates_per_batch: int
    optimizer: OptimizerSettings
    arithmetic: Arithmetic
    send_adapters: bool = False
    """where there are adapters, only they travel to the generators"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One training step. `skipped` tells why the policy was not changed, or is empty."""

    version: int
    """of the weights after the step"""
    skipped: str
    seconds: float
    metrics: Mapping[str, float]
    stopped: str = ""
    """why a later update on the batch was not taken, nor those behind it; or empty"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the first update on a batch would be, with nothing changed by looking."""

    skipped: str
    """why there would be none, or empty"""
    gradient: Tensor  # [parameters]
    """of the loss, all parameters one after the other, before clipping"""
    coefficients: Tensor  # [policy tokens]
    """with an exact baseline taken off"""
    learning_rate_factor: float
    metrics: Mapping[str, float]
    state: ObjectiveState
    """the objective's state behind the update"""


class Learner:
    """Model, optimizer and the objective's running state.

    Over ranks everything here but `version` and `state` is collective: each rank runs its share of a batch,
    all have its columns and take the same step. What could part them by rounding, skipping and factors, is
    the leader's."""

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
        """Train on one batch. The policy's weights and moments stay as they are when nothing can be learned from it;
        of several updates, those before the first that cannot be taken count."""
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        stopped = ""
        done, updates = 0, self.options.updates_per_batch
        start: Columns | None = None
        while done < updates and not stopped:
            pass_ = self._pass(batch)
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

    def look(self, batch: PackedBatch) -> Look:
        """The gradient that `step` would begin with; weights, moments and state stay as they are. With one
        rank only: studies of stored batches run in one process."""
        assert self.ranks.size == 1, "a look is for one rank"
        pass_ = self._pass(batch)
        columns = self._columns(batch, pass_.log_probs, None)
        answer, state = self._objective(columns, self.recipe, self.state)
        self.optimizer.zero_grad(set_to_none=True)
        clipped_norm = pass_.clipped_norm(answer)
        metrics = {**answer.metrics, **pass_.backward(answer, columns, self.recipe)}
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
        return Look(
            skipped=answer.skip,
            gradient=found,
            coefficients=used,
            learning_rate_factor=math.prod(factors.values()),
            metrics=metrics,
            state=state,
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights by name, detached; not copied but where adapters are added to them. Of a sharded
        model this rank's part of each."""
        if self.adapters is not None:
            return dict(self.adapters.weights())
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters by name, in order of name, whole, one after another. Collective: every rank goes through
        all of them; what it gets counts on the leader. Not copied where a rank holds them whole, and with nothing
        added to them."""
        if self.adapters is not None:  # every rank has them, and the model, whole
            yield from self.adapters.weights()
            return
        for name, parameter in sorted(self.weights().items()):
            yield name, full(parameter)

    def sent(self) -> dict[str, Tensor]:
        """What travels to the generators."""
        if self.adapters is not None and self.options.send_adapters:
            return self.adapters.tensors()
        return self.weights()

    @property
    def sent_bytes(self) -> int:
        """Of what travels, in the dtypes it has here; nothing is added up for that."""
        alone = self.adapters is not None and self.options.send_adapters
        kept = [p for p in self.model.parameters() if self.adapters is None or p.requires_grad == alone]
        return sum(p.numel() * p.element_size() for p in kept)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, detached from nothing."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------- one update

    def _pass(self, batch: PackedBatch) -> gradient.Pass:
        return gradient.Pass(self.model, batch, self.options.arithmetic, self.needs, self.ranks, self._parameters)

    def _agreed(self, answer: Coefficients, state: ObjectiveState) -> tuple[Coefficients, ObjectiveState]:
        """The leader's decisions. Columns may differ by rounding, which does no harm."""
        if self.ranks.size == 1:
            return answer, state
        mine = {"skip": answer.skip, "factors": dict(answer.learning_rate_factors), "state": state.to_dict()}
        led = json.loads(self.ranks.broadcast_bytes(json.dumps(mine).encode()))
        answer = replace(answer, skip=led["skip"], learning_rate_factors=led["factors"])
        return answer, ObjectiveState.from_dict(led["state"])

    def _columns(self, batch: PackedBatch, log_probs: LogProbs, start: Columns | None) -> Columns:
        """The batch under the current weights; `start`: its columns before the step's first update."""
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
        pass_: gradient.Pass,
        columns: Columns,
        answer: Coefficients,
        state: ObjectiveState,
        metrics: dict[str, float],
    ) -> str:
        """Backward and optimizer step; why it was skipped, or an empty string."""
        settings = self.options.optimizer
        base = base_learning_rate(self.version, steps=self.options.steps, optimizer=settings, given_up=self.given_up)
        if self.critic is not None and self.version - self.given_up < self.critic.warmup_steps:
            self.state = state
            metrics |= {"critic/warmup": 1.0, "lr/base": base, "lr/effective": 0.0}
            return ""
        self.optimizer.zero_grad(set_to_none=True)
        clipped_norm = pass_.clipped_norm(answer)
        metrics.update(pass_.backward(answer, columns, self.recipe))
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
            "reward/mean": batch.reward.mean().item(),
            "len/mean": batch.num_policy_tokens / batch.num_trajectories,
            "batch/trajectories": batch.num_trajectories,
            "batch/policy_tokens": batch.num_policy_tokens,
            "batch/tokens": batch.num_tokens,
            "batch/micro_batches": len(batch.micro_batches),
            **({} if batch.share is None else {"batch/rank_imbalance": batch.share.imbalance}),
        }


def make_optimizer(model: torch.nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, as is usual."""
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
    """One optimizer step at `learning_rate`, which is put back afterwards: factors of one step never
    reach the schedule or a checkpoint."""
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
