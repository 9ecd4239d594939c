"""From settings to a learner: model, recipe and what it needs, and how batches are laid over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig, tensor_shapes
from async_rl.model.decoder import DTYPES, Decoder, LayerExecution
from async_rl.model.folder import CONFIG, existing, load_model, read_config, read_json
from async_rl.model.lora import WithoutAdapters, add_adapters
from async_rl.model.varlen import Backend, make_kernel, usable_backend
from async_rl.objective.library import load_recipe
from async_rl.objective.recipe import requirements
from async_rl.trainer.checkpoint import load_critic
from async_rl.trainer.critic import Critic
from async_rl.trainer.forward import ModelArithmetic
from async_rl.trainer.learner import Learner, LearnerOptions
from async_rl.trainer.ranks import Ranks, is_sharded, one_rank
from async_rl.trainer.sharding import load_sharded
from async_rl.trainer.shares import Cost, Spread
from async_rl.trainer.teachers import make_teachers

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model


def make_learner(settings: Settings, ranks: Ranks | None = None) -> Learner:
    """The learner of a run: the model of `model.path` in float32, and the reference and critic that the recipe needs.

    Every rank calls it together. Raises UserError.
    """
    ranks = ranks or one_rank()
    recipe = load_recipe(settings.recipe)
    needs = requirements(recipe)
    dtype = DTYPES[settings.trainer.dtype]
    arithmetic = ModelArithmetic(
        temperature=settings.generator.temperature,
        dtype=dtype,
        kernel=make_kernel(backend_of(settings)),
        lanes=max(1, settings.trainer.lanes),
    )
    torch.manual_seed(settings.seed)
    lora = settings.lora
    model = policy_model(settings, ranks)
    adapters = add_adapters(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets) if lora.rank else None
    sharded = is_sharded(model)
    if not sharded:
        for parameter in model.parameters():
            ranks.broadcast_tensor(parameter.data)
    reference: Model | WithoutAdapters | None = None
    if needs.reference and adapters:
        reference = WithoutAdapters(model, adapters)
    elif needs.reference:
        reference = (policy_model(settings, ranks) if sharded else deepcopy(model)).requires_grad_(False)
    critic = None
    if needs.value:
        of_its_own = sharded and settings.critic.kind == "model"
        trunk, slow_trunk = (
            policy_model(settings, ranks) if of_its_own and needed else None
            for needed in (True, settings.critic.target_average)
        )
        critic = Critic(
            model,
            settings.critic,
            arithmetic,
            ranks=ranks,
            trunk=trunk,
            slow_trunk=slow_trunk,
            turn_q=needs.turn_q,
            median=needs.median,
        )
        if settings.critic.path:
            load_critic(Path(settings.critic.path), critic)
    teachers = make_teachers(settings, arithmetic, ranks) if needs.teacher else None
    options = LearnerOptions(
        steps=settings.trainer.steps,
        optimizer=settings.optimizer,
        arithmetic=arithmetic,
        updates=settings.updates,
        reference=settings.reference,
        seed=settings.seed,
        send_adapters=lora.send == "adapter",
    )
    return Learner(
        model,
        recipe,
        options,
        reference=reference,
        critic=critic,
        teachers=teachers,
        adapters=adapters,
        ranks=ranks,
        over=spread_over(settings, ranks),
    )


def policy_model(settings: Settings, ranks: Ranks) -> Model:
    """The model that a run begins with, on this rank: whole, or this rank's part. Raises UserError."""
    path, trainer = Path(settings.model.path), settings.trainer
    if trainer.sharding == "full" and ranks.size > 1:
        model = load_sharded(path, ranks, device=trainer.device, dtype=DTYPES[trainer.dtype])
    else:
        model = load_model(path, device=trainer.device)
    set_execution(model, settings)
    return model


def set_execution(model: Model, settings: Settings) -> None:
    """Checkpoint and compile layers as trainer.checkpoint_activations and trainer.compile say. Raises UserError for a
    model that cannot."""
    chosen = settings.trainer
    execution = LayerExecution(checkpointed=chosen.checkpoint_activations == "layer", compiled=chosen.compile)
    if isinstance(model, Decoder):
        model.set_execution(execution)
        return
    if execution.compiled:
        raise UserError(
            f"trainer.compile is for the built-in decoder, and {settings.model.path} is a model that transformers "
            "defines; set trainer.compile=false"
        )
    if execution.checkpointed:
        model.checkpoint_layers(settings.model.path)


def backend_of(settings: Settings) -> Backend:
    """What computes attention among packed documents. Raises UserError when `trainer.attention` is not available."""
    asked = settings.trainer
    return usable_backend(asked.attention, device=asked.device, half=asked.dtype == "bfloat16")


def spread_over(settings: Settings, ranks: Ranks) -> Spread | None:
    """How batches are laid over ranks; None with one. Reads config.json and the recipe."""
    if ranks.size == 1:
        return None
    # An exact baseline compares gradients within a group: its norms are then known where it is trained.
    whole = requirements(load_recipe(settings.recipe)).per_trajectory_norms
    return Spread(rank=ranks.rank, size=ranks.size, cost=model_cost(settings.model.path), whole_groups=whole)


# What a trajectory costs the model of a folder, for laying batches over ranks: per token 2 x the elements of the
# layers' matrices, per predicted token 2 x those of the head, and per pair of a token and one it sees 4 x layers x
# heads x head_dim (score and value). For Qwen2.5-7B a pair costs 0.4 M operations and a token 13 G: attention costs as
# much as the matrices at 65,000 tokens, a tenth at 6,500.


def model_cost(path: str | Path) -> Cost:
    """The cost from config.json alone. It decides which rank does what, never a result.

    For an architecture left to transformers it is an estimate: dense SwiGLU layers of the sizes that its config names.
    """
    config = read_config(path)
    if config is None:
        return _estimate(read_json(existing(path) / CONFIG))
    return decoder_cost(config)


def decoder_cost(config: DecoderConfig) -> Cost:
    """The exact cost of the built-in decoder."""
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )
    return Cost(
        per_token=2 * matrices,
        per_policy_token=2 * config.vocabulary * config.hidden,
        per_pair=4 * config.layers * config.heads * config.head_dim,
    )


def _estimate(values: Mapping[str, Any]) -> Cost:
    """The cost of dense layers with the sizes in a config.json."""
    values = values.get("text_config") or values

    def number(*names: str, default: int) -> int:
        return next((int(values[name]) for name in names if isinstance(values.get(name), int)), default)

    hidden = number("hidden_size", "n_embd", "d_model", default=1024)
    layers = number("num_hidden_layers", "n_layer", default=1)
    heads = number("num_attention_heads", "n_head", default=1)
    width = heads * number("head_dim", default=hidden // heads)
    narrow = width * number("num_key_value_heads", default=heads) // heads
    inner = number("intermediate_size", "n_inner", default=4 * hidden)
    return Cost(
        per_token=2 * layers * hidden * (2 * width + 2 * narrow + 3 * inner),
        per_policy_token=2 * hidden * number("vocab_size", default=1),
        per_pair=4 * layers * width,
    )
