"""Weights over CUDA IPC: vLLM's workers on the trainer's own GPU map the staged tensors and copy from there.

Needs a GPU: not run yet; what is built of handles is tested on invented ones.

vLLM's own client pickles the handles (VLLM_ALLOW_INSECURE_SERIALIZATION); ours takes them apart into plain
numbers and bytes, which cross the Unix socket of the run as msgpack like everything else, and the worker's part
(generator/vllm_worker.py) puts the tuple of torch's `rebuild_cuda_tensor` together again from classes it names
itself. So nothing that comes from outside is unpickled, and a handle is of use only to processes of this host.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from async_rl.vllm_release import Release
from async_rl.weights.link import Control
from async_rl.weights.staged import Staged

if TYPE_CHECKING:
    from torch import Tensor

REBUILD = (
    "tensor_cls",
    "tensor_size",
    "tensor_stride",
    "tensor_offset",
    "storage_cls",
    "dtype",
    "storage_device",
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "requires_grad",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""parameters of torch.multiprocessing.reductions.rebuild_cuda_tensor, which a test compares"""
_BYTES = ("storage_handle", "ref_counter_handle", "event_handle")
_NUMBERS = (
    "tensor_offset",
    "storage_device",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_offset",
    "event_sync_required",
)
HAS_PACKED: Release = (0, 27)
"""since then vLLM is told at the beginning, and not in every update, whether tensors come packed"""
TENSORS_A_CALL = 1000
"""some 600 bytes each"""


class IpcLink:
    """`WeightLink` into vLLM's IPC engine. Not through its trainer side, which would gather handles over the
    trainer's default process group, where the training step has its own collectives under way."""

    def __init__(self, control: Control, staged: Staged, *, has_packed: bool) -> None:
        """`has_packed`: vLLM's IPCWeightTransferInitInfo knows the word."""
        self._control, self._staged, self._has_packed = control, staged, has_packed

    def offer(self) -> None:
        self._control.init_weight_transfer_engine({"packed": False} if self._has_packed else {})

    def send(self) -> None:
        gpu = self._gpu()
        named = list(self._staged.named_parameters())
        self._control.start_weight_update()
        for start in range(0, len(named), TENSORS_A_CALL):
            self._control.update_weights(self._export(named[start : start + TENSORS_A_CALL], gpu))
        self._control.finish_weight_update()
        self._take_back()

    def _gpu(self) -> str:
        """UUID of the GPU that sends."""
        torch.cuda.set_device(self._staged.device)
        return str(torch.cuda.get_device_properties(self._staged.device).uuid)

    def _export(self, named: Sequence[tuple[str, Tensor]], gpu: str) -> dict[str, Any]:
        return update_info(named, gpu)

    def _take_back(self) -> None:
        """Forget exports that the workers have let go of."""
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """Nothing waits here but calls, which end by themselves."""


def update_info(named: Sequence[tuple[str, Tensor]], gpu: str) -> dict[str, Any]:
    """What the worker is told of some tensors on `gpu` (its UUID). Every update exports them anew: an export is
    counted, and given back when the worker lets go of it."""
    from torch.multiprocessing.reductions import reduce_tensor

    return {
        "names": [name for name, _ in named],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
        "shapes": [list(tensor.shape) for _, tensor in named],
        "gpu": gpu,
        "handles": [taken_apart(reduce_tensor(tensor)[1]) for _, tensor in named],
    }


def taken_apart(arguments: Sequence[Any]) -> dict[str, Any]:
    """Plain data of one handle: the arguments of `rebuild_cuda_tensor`. Raises ValueError for others."""
    if len(arguments) != len(REBUILD):
        raise ValueError(f"torch gives {len(arguments)} values for a CUDA tensor, not {len(REBUILD)}")
    given = dict(zip(REBUILD, arguments, strict=True))
    return {
        "size": list(given["tensor_size"]),
        "stride": list(given["tensor_stride"]),
        **{name: int(given[name]) for name in _NUMBERS},
        **{name: base64.b64encode(given[name]).decode() for name in _BYTES},
    }


def put_together(plain: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments again, with classes named here. Raises ValueError for what is no handle."""
    parts = {"size": list, "stride": list, **dict.fromkeys(_NUMBERS, int), **dict.fromkeys(_BYTES, str)}
    if plain.keys() != parts.keys() or any(type(plain[name]) is not kind for name, kind in parts.items()):
        raise ValueError(f"a handle has {sorted(parts)}")
    if any(type(number) is not int for number in [*plain["size"], *plain["stride"]]):
        raise ValueError("a handle's size and stride are numbers")
    given: dict[str, Any] = {name: plain[name] for name in _NUMBERS}
    given |= {name: base64.b64decode(plain[name], validate=True) for name in _BYTES}
    given |= {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size(plain["size"]),
        "tensor_stride": tuple(plain["stride"]),
        "storage_cls": torch.storage.TypedStorage,
        "dtype": dtype,
        "requires_grad": False,
        "event_sync_required": bool(plain["event_sync_required"]),
    }
    return tuple(given[name] for name in REBUILD)
