"""From settings to a learner."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from async_rl.batch import PackedBatch, pack_batch
from async_rl.errors import RunFailed, UserError
from async_rl.model.decoder import DTYPES
from async_rl.model.folder import load_model
from async_rl.model.lora import WithoutAdapters, add_adapters
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.settings import Settings
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import Arithmetic
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.ranks import Ranks, one_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from async_rl.trainer.forward import Model
    from async_rl.trajectory import Trajectory


def make_learner(settings: Settings, ranks: Ranks | None = None) -> Learner:
    """The model of `model.path` (float32 weights) with the recipe's needs filled; on every rank together.
    Raises UserError."""
    ranks = ranks or one_rank()
    if ranks.size > 1:
        raise UserError("training over several ranks is not there yet; start one trainer rank")
    recipe = load_recipe(settings.recipe)
    needs = requirements(recipe)
    arithmetic = Arithmetic(temperature=settings.generator.temperature, dtype=DTYPES[settings.trainer.dtype])
    torch.manual_seed(settings.seed)
    model = load_model(Path(settings.model.path), device=settings.trainer.device)
    lora = settings.lora
    adapters = add_adapters(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets) if lora.rank else None
    reference: Model | WithoutAdapters | None = None
    if needs.reference:
        reference = WithoutAdapters(model, adapters) if adapters else deepcopy(model).requires_grad_(False)
    critic = Critic(model, settings.critic, arithmetic) if needs.value else None
    options = LearnerOptions(
        steps=settings.trainer.steps,
        updates_per_batch=settings.trainer.updates_per_batch,
        optimizer=settings.optimizer,
        arithmetic=arithmetic,
        send_adapters=lora.send == "adapter",
    )
    return Learner(model, recipe, options, reference=reference, critic=critic, adapters=adapters, ranks=ranks)


def pack_step(settings: Settings, trajectories: Sequence[Trajectory], ranks: Ranks | None = None) -> PackedBatch:
    """The batch of a step as it is trained: failed trajectories are left out. Every rank is given all of
    them and gets the columns of all, and micro-batches of its own share."""
    ranks = ranks or one_rank()
    assert ranks.size == 1
    usable = [t for t in trajectories if not t.failed]
    if not usable:
        raise RunFailed("the batch holds no usable trajectory")
    limit = settings.trainer.micro_batch_tokens
    return pack_batch(usable, micro_batch_tokens=limit, device=settings.trainer.device)
