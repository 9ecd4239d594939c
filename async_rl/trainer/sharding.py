"""A model whose weights, gradients and moments are split over the ranks with torch's FSDP2, and its state on disk.

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

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from async_rl.errors import UserError
from async_rl.model.architecture import DecoderConfig
from async_rl.model.decoder import Decoder
from async_rl.model.folder import TensorFiles, check_folder, load_model
from async_rl.trainer.ranks import Ranks, is_sharded

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model

ROWS = "rows"
"""in a file's header: JSON, name -> [first row, rows of the whole tensor] of what is not whole in it"""


def load_sharded(path: Path, ranks: Ranks, *, device: torch.device | str, dtype: torch.dtype) -> Model:
    """The model of a folder in float32, sharded; it computes in `dtype`. Collective.

    The built-in decoder never exists whole: every rank reads its rows of each tensor. Other architectures are built by
    transformers, whole, in the host's memory, by one rank after the other, and then cut.
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
    """Split the model in place, without communication.

    Parameters become DTensors; those of which a rank has no row are empty there. Raises UserError for an architecture
    whose layers are not found.
    """
    assert ranks.mesh is not None
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        # inputs stay as they are: the residual stream is float32 under autocast
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
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
    """Copy the weights of a folder into a model of its shape, whole or sharded.

    Each rank reads only its rows of the built-in decoder. Raises KeyError for a parameter that is not there.
    """
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
    """The rows start <= row < stop of a tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    return rows_of(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor [n, ...] that this rank holds, [own n, ...], not copied."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
    """The built-in decoder, sharded before it has weights; then every rank reads its rows."""
    with torch.device("meta"):
        model = Decoder(config)
    shard(model, ranks, dtype=dtype)
    model.to_empty(device=device)
    load_weights(model, path)
    return model


# State that several ranks hold, on disk: each rank writes the rows it has, and any number of ranks reads them back. A
# tensor is cut along its first dimension as torch.chunk cuts it, which is how FSDP2 lays it over ranks: pieces of equal
# length, the last ones shorter or empty. One rank writes `optimizer.safetensors`, several write
# `optimizer-00001-of-00002.safetensors` and so on; a file's header says which rows of which length it holds. This is
# not torch.distributed.checkpoint, because that reads its own files by executing them.


def rows_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """The rows start <= row < stop of `total` that a rank holds."""
    each = -(-total // size)
    start = min(rank * each, total)
    return start, min(start + each, total)


def save_rows(tensors: Mapping[str, Tensor], folder: Path, stem: str, ranks: Ranks) -> None:
    """Write this rank's part of the tensors. Every rank calls it with the same names; the leader writes scalars.

    No collective. Raises OSError or SafetensorError.
    """
    mine: dict[str, Tensor] = {}
    where: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if ranks.size == 1 or tensor.ndim == 0:
            if ranks.leads:
                mine[name] = tensor
            continue
        start, stop = rows_of(tensor.shape[0], ranks.rank, ranks.size)
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor[start:stop]
        assert len(part) == stop - start, f"{name} is laid over ranks otherwise"
        if len(part):
            mine[name], where[name] = part, [start, tensor.shape[0]]
    # Cloned: safetensors refuses views of a joint buffer.
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in mine.items()}
    save_file(content, folder / _file_name(stem, ranks), metadata={ROWS: json.dumps(where)} if where else None)


def _file_name(stem: str, ranks: Ranks) -> str:
    return f"{stem}.safetensors" if ranks.size == 1 else f"{stem}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    file: Any
    start: int
    stop: int


@dataclass(slots=True)
class RowFiles:
    """What `save_rows` wrote, on any number of ranks. A context; files are mapped, and only rows asked for are read."""

    folder: Path
    stem: str
    _stack: ExitStack = field(default_factory=ExitStack)
    _pieces: dict[str, list[_Piece]] = field(default_factory=dict)
    _whole: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> RowFiles:
        files = [self.folder / f"{self.stem}.safetensors"]
        if not files[0].is_file():
            files = sorted(self.folder.glob(f"{self.stem}-*-of-*.safetensors"))
        if not files:
            raise UserError(f"{self.folder} does not belong to these settings: no {self.stem}.safetensors is in it")
        for path in files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            where = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in where:
                    start = where[name][0]
                    stop = start + file.get_slice(name).get_shape()[0]
                    self._pieces.setdefault(name, []).append(_Piece(file=file, start=start, stop=stop))
                else:
                    self._whole[name] = file
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._whole.keys() | self._pieces.keys()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start <= row < stop, [stop - start, ...], on the CPU. Raises KeyError for a name that is not there."""
        if name in self._whole:
            part: Tensor = self._whole[name].get_slice(name)[start:stop]
            return part
        found = [
            piece.file.get_slice(name)[max(start, piece.start) - piece.start : min(stop, piece.stop) - piece.start]
            for piece in sorted(self._pieces[name], key=lambda piece: piece.start)
            if piece.start < stop and start < piece.stop
        ]
        if sum(map(len, found)) != stop - start:
            raise KeyError(f"rows {start} to {stop - 1} of {name}")
        return torch.cat(found) if found else self._pieces[name][0].file.get_slice(name)[0:0]

    def scalar(self, name: str) -> Tensor:
        """A tensor [] that is not cut."""
        value: Tensor = self._whole[name].get_tensor(name)
        return value

    def as_laid_out(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape of `like`, on its device, laid over ranks as `like` is: each rank reads its own."""
        if isinstance(like, DTensor):
            mesh = like.device_mesh
            start, stop = rows_of(like.shape[0], mesh.get_local_rank(), mesh.size())
            local = self.rows(name, start, stop).to(like.to_local().device)
            return DTensor.from_local(
                local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return self.rows(name, 0, like.shape[0]).to(like.device)
