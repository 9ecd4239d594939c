"""Weights over NCCL, from the trainer's GPU to the workers of one vLLM on other GPUs, by vLLM's own trainer side.

Needs GPUs: not run yet. Its control flow was, with gloo in NCCL's place (tests/weights/test_vllm_link.py): vLLM's
`send_weights` and worker engine around a process group of the test.

vLLM meets over a TCPStore of its own, on the loopback and a port that is used once, and lets it carry a pickled
NCCL id: on a machine whose other users are not trusted, choose weights.transport=shared_memory.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from async_rl.weights.link import Control, Staged
from async_rl.weights.vllm_release import TRAINER_FACTORY, Release
from async_rl.wire.endpoint import LOOPBACK, free_port

if TYPE_CHECKING:
    from torch import Tensor


# -------------------- ipc
# Weights over CUDA IPC: vLLM's workers on the trainer's own GPU map the staged tensors and copy from there.
#
# Needs a GPU: not run yet; what is built of handles is tested on invented ones.
#
# vLLM's own client pickles the handles (VLLM_ALLOW_INSECURE_SERIALIZATION); ours takes them apart into plain
# numbers and bytes, which cross the Unix socket of the run as msgpack like everything else, and the worker's part
# (generator/vllm_worker.py) puts the tuple of torch's `rebuild_cuda_tensor` together again from classes it names
# itself. So nothing that comes from outside is unpickled, and a handle is of use only to processes of this host.

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


BUFFER_BYTES = 256 << 20
"""of each of vLLM's two packing buffers, on either side"""


class NcclLink:
    """`WeightLink` through `WeightTransferTrainerFactory` (vLLM 0.28 and newer)."""

    def __init__(
        self, control: Control, staged: Staged, *, workers: int, init_info: Callable[..., Any] | None = None
    ) -> None:
        """`workers`: processes of this vLLM. `init_info`: vLLM's NCCLTrainerInitInfo, or one like it that names
        another registered engine."""
        self._control, self._staged, self._workers = control, staged, workers
        self._init_info = init_info
        self._engine: Any = None

    def offer(self) -> None:
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        _on_device(self._staged)
        info = (self._init_info or NCCLTrainerInitInfo)(
            rank=0,  # the only sender: what is staged is whole, on the trainer's first rank
            master_address=LOOPBACK,
            master_port=free_port(),
            world_size=1 + self._workers,
            packed_buffer_size_bytes=BUFFER_BYTES,
        )
        staged = self._staged

        class Source(ModuleSource):  # names and shapes from where they are held, tensors from where they are sent
            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return staged.on_device()

            def iter_full(self) -> Iterator[tuple[str, Tensor]]:  # as vLLM calls it from 0.33 on
                return staged.on_device()

        source = Source(module=_AsModule(staged))
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=source)

    def send(self) -> None:
        self._engine.send_weights()

    def close(self) -> None:
        _abort(getattr(self._engine, "model_update_group", None))


class OldNcclLink:
    """The same for vLLM 0.26 and 0.27, whose trainer side only sends: the order of calls is that of 0.28."""

    def __init__(self, control: Control, staged: Staged, *, workers: int) -> None:
        self._control, self._staged, self._workers = control, staged, workers
        self._group: Any = None

    def offer(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        _on_device(self._staged)
        meeting = {"master_address": LOOPBACK, "master_port": free_port(), "world_size": 1 + self._workers}
        init = _Beside(lambda: self._control.init_weight_transfer_engine({**meeting, "rank_offset": 1}))
        self._group = trainer_init(meeting)
        init.done()

    def send(self) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerSendWeightsArgs,
            NCCLWeightTransferEngine,
        )

        tensors = dict(self._staged.named_parameters())
        update = {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "packed": True,
            "packed_buffer_size_bytes": BUFFER_BYTES,
        }
        self._control.start_weight_update()
        received = _Beside(lambda: self._control.update_weights(update))
        arguments = NCCLTrainerSendWeightsArgs(group=self._group, packed=True, packed_buffer_size_bytes=BUFFER_BYTES)
        NCCLWeightTransferEngine.trainer_send_weights(self._staged.on_device(), arguments)
        received.done()
        self._control.finish_weight_update()

    def close(self) -> None:
        _abort(self._group)


def make_nccl_link(control: Control, staged: Staged, *, workers: int, release: Release) -> NcclLink | OldNcclLink:
    made = NcclLink if release >= TRAINER_FACTORY else OldNcclLink
    return made(control, staged, workers=workers)


class _AsModule(torch.nn.Module):
    """What vLLM's `ModuleSource` looks at of a module."""

    def __init__(self, staged: Staged) -> None:
        super().__init__()
        self._staged = staged

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return self._staged.named_parameters()


class _Beside:
    """A call that runs beside another one, as both sides of an NCCL call must."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # the boundary of this thread: raised in `done`
            self._error = error

    def done(self) -> None:
        self._thread.join()  # by the deadline of the control's calls
        if self._error is not None:
            raise self._error


def _on_device(staged: Staged) -> None:
    """vLLM takes the thread's own current device."""
    if staged.device.type == "cuda":
        torch.cuda.set_device(staged.device)


def _abort(group: Any) -> None:
    """ncclCommAbort: whoever waits in this communicator, here, waits no longer."""
    if group is not None:
        group.destroy()
