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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import cos, pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from async_rl.config import OptimizerSettings, ReferenceSettings, UpdatesSettings
from async_rl.objective import Coefficients, Columns, ObjectiveState
from async_rl.objective.coefficients import finish, objective_of
from async_rl.objective.recipe import Recipe, passes, requirements
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic, batch_log_probs
from async_rl.trainer.gradient import Pass
from async_rl.trainer.moving_reference import move_reference
from async_rl.trainer.packing import PackedBatch
from async_rl.trainer.ranks import (
    Ranks,
    clip_gradient,
    free,
    full,
    one_rank,
    whole_log_probs,
)
from async_rl.trainer.shares import Spread
from async_rl.trainer.teachers import Teachers
from async_rl.trainer.updates import Part, Start, Taken, kl_moved, parts_of
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model
    from async_rl.model.lora import Adapters, WithoutAdapters


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerOptions:
    """What the settings say to a learner."""

    steps: int
    """training steps of the whole run, for the schedule"""
    optimizer: OptimizerSettings
    arithmetic: ModelArithmetic
    updates: UpdatesSettings = field(default_factory=UpdatesSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    seed: int = 0
    """of the minibatches"""
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
        teachers: Teachers | None = None,
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
        self.passes = passes(recipe)
        self._objective = objective_of(recipe)
        self.reference = reference
        self.critic = critic
        self.teachers = teachers
        self.adapters = adapters
        self.version = 0
        self.given_up = 0
        """steps by which the version runs ahead of what these weights were trained, since the run went back"""
        self.rate_scale = 1.0
        """factor on the policy's learning rate, since then"""
        self.before_write: Callable[[], None] = lambda: None
        """called before the policy's weights change: they may still be copied (trainer/publication.py)"""
        self.state = ObjectiveState()
        assert reference is not None or not self.needs.reference, "this recipe needs a reference model"
        assert teachers is not None or not self.needs.teacher, "this recipe needs teachers"
        assert critic is not None or not self.needs.value, "this recipe needs a critic"
        self.optimizer = make_optimizer(model, options.optimizer)

    def step(self, batch: PackedBatch) -> StepReport:
        """Train on one batch: for each update (`updates.parts_of`) forward, columns, coefficients, backward,
        optimizer.

        The policy's weights and moments stay as they are when nothing can be learned from the batch. Of several
        updates, those before the first that cannot be taken count; a minibatch without anything to learn is left out.
        """
        started = time.perf_counter()
        plan, taken = self.options.updates, Taken()
        several = plan.epochs * plan.minibatches > 1 or self.passes != 1
        start = self._start(batch) if plan.minibatches > 1 else None
        for epoch in range(plan.epochs):
            before = taken.done
            for part, turn_pass in self._updates(batch, epoch):
                start = self._train(part, start, taken, turn_pass)
                if taken.stopped:
                    break
            if taken.done == before and not taken.stopped:  # nothing has changed: a further pass would find the same
                taken.stopped = taken.left_out[-1] if taken.left_out else "the batch has no policy token"
            if taken.stopped:
                break
        free(self.model)
        self.version += 1
        if self.reference_moves:
            move_reference(self.reference, self.model, self.options.reference, self.version)
        return StepReport(
            version=self.version,
            skipped="" if taken.done else taken.stopped,
            stopped=taken.stopped if taken.done else "",
            seconds=time.perf_counter() - started,
            metrics={**taken.metrics(several=several), **self._batch_metrics(batch)},
        )

    def _updates(self, batch: PackedBatch, epoch: int) -> Iterator[tuple[Part, int | None]]:
        """The minibatches of an epoch, each once, or once for each turn of its longest trajectory; or all of them once
        for each part of the tokens (`token_order`)."""
        many = self.passes
        for number, part in product(range(many or 1), self._parts(batch, epoch)):
            if many is not None:
                yield part, None if many == 1 else number
                continue
            sampled = part.batch.trajectory_of_turn[part.batch.turn_of_token.unique()]
            for turn_pass in range(int(sampled.bincount().max()) if len(sampled) else 1):
                yield part, turn_pass

    def _parts(self, batch: PackedBatch, epoch: int) -> list[Part]:
        return list(parts_of(batch, self.options.updates, seed=self.options.seed, step=self.version, epoch=epoch))

    def _train(self, part: Part, start: Start | None, taken: Taken, turn_pass: int | None) -> Start:
        """One update, unless it cannot be taken. `start`: of the whole batch; None: this is its first update. Returns
        it."""
        metrics: dict[str, float] = {}
        pass_ = self._forward(part.batch)
        columns = self._columns(part.batch, pass_.log_probs, None if start is None else start.rows(part))
        start = start or Start.of(columns)
        columns = replace(columns, turn_pass=turn_pass)
        if taken.done and self._has_moved_far(columns, taken):
            return start
        answer, state = self._agreed(*self._objective(columns, self.recipe, self.state))
        metrics.update(answer.metrics)
        if self.critic is not None and answer.value_grad is not None:
            columns = self._train_critic(part.batch, columns, answer, metrics)
            if self.needs.turn_q:  # the policy is trained on what the critic says now
                answer, state = self._agreed(*self._objective(columns, self.recipe, self.state))
        if answer.skip:
            taken.left_out.append(answer.skip)
        else:
            taken.stopped = self._update(pass_, columns, answer, state, metrics)
            taken.done += not taken.stopped
        taken.add(metrics)
        return start

    def _train_critic(
        self, batch: PackedBatch, columns: Columns, answer: Coefficients, metrics: dict[str, float]
    ) -> Columns:
        """`critic.epochs` updates of the critic on a minibatch; the columns with what it says behind the last one
        where that is looked at, else behind the last but one."""
        assert self.critic is not None
        for update in range(self.critic.epochs):
            if update:
                answer, _ = self._objective(columns, self.recipe, self.state)
            assert answer.value_grad is not None
            earlier = None
            if batch.earlier is not None:
                assert answer.value_target is not None
                of_earlier = batch.earlier.targets(answer.value_target, self.recipe.advantage.discount)
                earlier = batch.earlier.batch, of_earlier
            metrics.update(self.critic.step(answer.value_grad, answer.value_target, answer.value_share, earlier))
            if update + 1 < self.critic.epochs or self.needs.turn_q:
                said: dict[str, Any] = self.critic.columns(batch)
                columns = replace(columns, **said)
        return columns

    def _has_moved_far(self, columns: Columns, taken: Taken) -> bool:
        """Whether the KL that `updates.kl_stop` bounds is above it, as the leader finds."""
        plan = self.options.updates
        if not plan.kl_stop:
            return False
        mine = kl_moved(columns, plan)
        taken.kl = mine if self.ranks.size == 1 else json.loads(self.ranks.broadcast_bytes(json.dumps(mine).encode()))
        if not taken.kl <= plan.kl_stop:
            whose = "policy that sampled" if plan.kl_target == "behaviour" else "policy at the start of the step"
            taken.stopped = (
                f"the KL of the {whose} to that after {taken.done} updates is {taken.kl:.3g}, above "
                f"updates.kl_stop={plan.kl_stop:g}"
            )
        return bool(taken.stopped)

    @property
    def reference_moves(self) -> bool:
        """Whether the reference follows the policy, so that a checkpoint holds it."""
        moves = self.options.reference
        return self.reference is not None and bool(moves.every or moves.average)

    def preview(self, batch: PackedBatch) -> Preview:
        """The gradient of the whole batch that `step` would begin with; weights, moments and state stay as they are.

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

    def _start(self, batch: PackedBatch) -> Start:
        """The batch under the weights before the first of several minibatches."""
        own = batch_log_probs(self.model, batch, self.options.arithmetic, proxy_share=self.needs.proxy_share)
        free(self.model)
        whole = whole_log_probs(own, batch, self.ranks)
        return Start(
            log_prob=whole.log_prob,
            log_proxy=whole.log_proxy,
            log_reference=self._log_reference(batch),
            log_teacher=self._log_teacher(batch),
            critic={} if self.critic is None else self.critic.start_columns(batch, self.critic.columns(batch)),
        )

    def _log_reference(self, batch: PackedBatch) -> Tensor | None:  # [T]
        if not self.needs.reference:
            return None
        assert self.reference is not None
        own = batch_log_probs(self.reference, batch, self.options.arithmetic)
        free(self.reference)
        return whole_log_probs(own, batch, self.ranks).log_prob

    def _log_teacher(self, batch: PackedBatch) -> Tensor | None:  # [T]
        return self.teachers.log_probs(batch) if self.teachers is not None and self.needs.teacher else None

    def _columns(self, batch: PackedBatch, log_probs: LogProbs, start: Start | None) -> Columns:
        """The batch under the current weights. `start`: its columns at the start of the step; None: the same."""
        log_prob = log_probs.log_prob.detach()
        of_critic: dict[str, Any] = {}
        if self.critic is not None:
            of_critic = self.critic.columns(batch)
            of_critic |= self.critic.start_columns(batch, of_critic) if start is None else start.critic
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
            forks=batch.forks,
            greedy=batch.greedy,
            reused=batch.reused,
            truncated=batch.truncated,
            cut=batch.cut,
            current_version=self.version,
            log_proximal=log_prob if start is None else start.log_prob,
            log_reference=self._log_reference(batch) if start is None else start.log_reference,
            log_teacher=self._log_teacher(batch) if start is None else start.log_teacher,
            log_proxy=log_probs.log_proxy if start is None else start.log_proxy,
            **of_critic,
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
        self.before_write()
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
