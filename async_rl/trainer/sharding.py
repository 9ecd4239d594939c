"""A model whose weights, gradients and moments are split over the ranks, with torch's FSDP2.

One group a layer: gathered before the layer's forward and again before its backward, freed behind each.
One group for the rest (embedding, last norm, head): gathered in the model's forward and freed at the end of
the backward. The head is used outside the model's forward, where log-probs are formed without keeping logits;
between forward and the end of backward `model.head` is therefore the whole weight, and what autograd adds to
its gradient is reduced with the group. It is the first weight that the backward needs, so nothing is held
longer than it would be anyway; after a forward without backward, `free` gives the memory back.

Gradients are summed over ranks, not averaged: coefficients carry the denominators of the whole batch.

With bfloat16 layers are gathered in bfloat16, half the traffic, and gradients reduced in float32. The group of
embedding and head stays in float32, and the forward runs under autocast as with one rank, so the residual
stream and the logits have the precision they have there; norms' weights alone are rounded to bfloat16 in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.model.folder import check_folder, load_model
from async_rl.model.slices import TensorFiles
from async_rl.trainer.ranks import Ranks
from async_rl.trainer.rows import rows_of

if TYPE_CHECKING:
    from async_rl.trainer.forward import Model


def load_sharded(path: Path, ranks: Ranks, *, device: torch.device | str, dtype: torch.dtype) -> Model:
    """The model of a folder in float32, sharded; `dtype` is that of its arithmetic. Collective.

    The built-in decoder never exists whole: every rank reads its rows of each tensor. Other architectures are
    built by transformers, whole, in the host's memory, by one rank after the other, and then cut.
    """
    config = check_folder(path)
    if config is not None:
        return _read_slices(config, path, ranks, device=device, dtype=dtype)
    model: Model | None = None
    for turn in range(ranks.size):
        if turn == ranks.rank:
            model = load_model(path)
            shard(model, ranks, dtype=dtype)
        ranks.barrier()
    assert model is not None
    return model


def shard(model: Model, ranks: Ranks, *, dtype: torch.dtype) -> None:
    """Split it in place; no communication. Parameters become DTensors, those a rank has no row of are empty.
    Raises UserError for an architecture whose layers are not found."""
    assert ranks.mesh is not None
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        # inputs stay as they are: the residual stream is float32 under autocast
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for layer in layers_of(model):
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=ranks.mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if not isinstance(model, Decoder) and hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        assert isinstance(model, FSDPModule)
        model.set_reduce_scatter_unused_params(True)  # experts that no token of this rank went to (torch >= 2.13)


@torch.no_grad()
def load_weights(model: Model, path: Path) -> None:
    """Put the weights of a folder into a model of its shape, whole or sharded: of the built-in decoder each rank
    reads its rows alone. Raises KeyError for a parameter that is not there."""
    if isinstance(model, Decoder) and is_sharded(model):
        with TensorFiles(path) as files:
            for name, parameter in model.named_parameters():
                start, stop = rows_here(parameter)
                if stop > start:
                    local_rows(parameter).copy_(files.rows(name, start, stop))
        return
    device = "cpu" if is_sharded(model) else next(model.parameters()).device
    stored = dict(load_model(path, device=device).named_parameters())
    for name, parameter in model.named_parameters():
        start, stop = rows_here(parameter)
        local_rows(parameter).copy_(stored[name][start:stop])


def rows_here(tensor: Tensor) -> tuple[int, int]:
    """First row of a tensor that this rank holds, and the one behind its last."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    return rows_of(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


def local_rows(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: object) -> bool:
    return isinstance(model, FSDPModule)


def gather_head(model: object) -> None:
    """See to it that `model.head` is whole, for a backward that uses it first. Collective where it is not."""
    if isinstance(model, FSDPModule):
        model.unshard()


def free(model: object) -> None:
    """Free what is gathered of embedding, last norm and head; parameters are the sharded ones again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def keep_head_after_backward(model: object) -> None:
    """For gradients that are formed after the backward, from the head too; whoever forms them calls `free`."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(False, recurse=False)


def add_gradient(parameter: DTensor, gradient: Tensor) -> None:
    """Sum this rank's `gradient` of the whole parameter over ranks, each rank adding its rows to `.grad`.
    Collective."""
    parts = DTensor.from_local(gradient, parameter.device_mesh, [Partial("sum")], run_check=False)
    rows = parts.redistribute(placements=parameter.placements)
    if parameter.grad is None:
        parameter.grad = rows
    else:
        parameter.grad += rows


def layers_of(model: Model) -> list[nn.Module]:
    """The layers, in order. Raises UserError where an architecture does not show them as one list."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.layers]
    if not lists:
        raise UserError(
            f"trainer.sharding=full needs a model with a list of its {model.config.layers} layers, and models of type "
            f"{model.config.family!r} show none; set trainer.sharding=none"
        )
    return list(lists[0])


def _read_slices(
    config: DecoderConfig, path: Path, ranks: Ranks, *, device: torch.device | str, dtype: torch.dtype
) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    shard(model, ranks, dtype=dtype)
    model.to_empty(device=device)
    load_weights(model, path)
    return model
