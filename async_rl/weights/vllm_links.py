"""Links into vLLM's workers: over NCCL to workers on other GPUs, over CUDA IPC to workers on the trainer's own GPU.

Both need GPUs and have not run yet. Their control flow was run with gloo in NCCL's place
(tests/generator/test_vllm_link.py: vLLM's `send_weights` and worker engine around a process group of the test), and the
code around IPC handles with invented handles.

NCCL: vLLM's own trainer side sends, for each link in a thread and on streams of its own. It connects over a TCPStore of
its own, on the loopback and a port that is used once, which carries a pickled NCCL id: on a machine whose other users
are not trusted, choose weights.transport=shared_memory.

IPC: the workers map the staged tensors and copy from there. vLLM's own client pickles the handles
(VLLM_ALLOW_INSECURE_SERIALIZATION). Ours splits them into plain numbers and bytes, which cross the run's Unix socket as
msgpack like every message; the worker's part (generator/vllm_worker.py) rebuilds the arguments of torch's
`rebuild_cuda_tensor` with classes that it names itself. So nothing from outside is unpickled, and a handle is of use
only to processes of this host.
"""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from async_rl.weights.link import Control, Staged
from async_rl.weights.vllm_release import TRAINER_FACTORY, Release
from async_rl.wire.endpoint import LOOPBACK, free_port

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
"""parameters of torch.multiprocessing.reductions.rebuild_cuda_tensor (a test compares them)"""
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
"""since this release the init call, not every update, says whether tensors come packed"""
TENSORS_A_CALL = 1000
"""tensors of one update call, some 600 bytes each"""
BUFFER_BYTES = 256 << 20
"""bytes of each of vLLM's two NCCL packing buffers, on either side"""


class NcclLink:
    """`WeightLink` through `WeightTransferTrainerFactory` (vLLM 0.28 and newer)."""

    def __init__(
        self, control: Control, staged: Staged, *, workers: int, init_info: Callable[..., Any] | None = None
    ) -> None:
        """`workers`: number of this vLLM's worker processes. `init_info`: vLLM's NCCLTrainerInitInfo, or a class like
        it that names another registered engine."""
        self._control, self._staged, self._workers = control, staged, workers
        self._init_info = init_info
        self._engine: Any = None

    def offer(self) -> None:
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        _on_device(self._staged)
        info = (self._init_info or NCCLTrainerInitInfo)(
            rank=0,  # the only sender: the trainer's first rank stages whole tensors
            master_address=LOOPBACK,
            master_port=free_port(),
            world_size=1 + self._workers,
            packed_buffer_size_bytes=BUFFER_BYTES,
        )
        staged, sent = self._staged, self._sent

        class Source(ModuleSource):  # names and shapes as staged, tensors on the device that sends
            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return sent()

            def iter_full(self) -> Iterator[tuple[str, Tensor]]:  # vLLM's name for it since 0.33
                return sent()

        source = Source(module=_AsModule(staged))
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._control, source=source)

    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        return _watched(self._staged, self._control)

    def send(self) -> None:
        self._engine.send_weights()

    def close(self) -> None:
        _abort(getattr(self._engine, "model_update_group", None))


class OldNcclLink:
    """`WeightLink` for vLLM 0.26 and 0.27, whose trainer side only sends. The order of calls is that of 0.28."""

    def __init__(self, control: Control, staged: Staged, *, workers: int) -> None:
        self._control, self._staged, self._workers = control, staged, workers
        self._group: Any = None

    def offer(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        _on_device(self._staged)
        meeting = {"master_address": LOOPBACK, "master_port": free_port(), "world_size": 1 + self._workers}
        init = _Concurrent(lambda: self._control.init_weight_transfer_engine({**meeting, "rank_offset": 1}))
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
        received = _Concurrent(lambda: self._control.update_weights(update))
        arguments = NCCLTrainerSendWeightsArgs(group=self._group, packed=True, packed_buffer_size_bytes=BUFFER_BYTES)
        NCCLWeightTransferEngine.trainer_send_weights(_watched(self._staged, self._control), arguments)
        received.done()
        self._control.finish_weight_update()

    def close(self) -> None:
        _abort(self._group)


def make_nccl_link(control: Control, staged: Staged, *, workers: int, release: Release) -> NcclLink | OldNcclLink:
    made = NcclLink if release >= TRAINER_FACTORY else OldNcclLink
    return made(control, staged, workers=workers)


class IpcLink:
    """`WeightLink` into vLLM's IPC engine. It does not use vLLM's trainer side, which would gather handles over the
    trainer's default process group while the training step has its own collectives there."""

    def __init__(self, control: Control, staged: Staged, *, has_packed: bool) -> None:
        """`has_packed`: vLLM's IPCWeightTransferInitInfo has the field `packed`."""
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
        """Free exports that the workers have released."""
        torch.cuda.ipc_collect()

    def close(self) -> None:
        """Only calls wait here, and they have deadlines."""


def update_info(named: Sequence[tuple[str, Tensor]], gpu: str) -> dict[str, Any]:
    """The update call for some tensors on `gpu` (its UUID). Every update exports them anew: an export is counted, and
    released when the worker frees it."""
    from torch.multiprocessing.reductions import reduce_tensor

    return {
        "names": [name for name, _ in named],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
        "shapes": [list(tensor.shape) for _, tensor in named],
        "gpu": gpu,
        "handles": [split_handle(reduce_tensor(tensor)[1]) for _, tensor in named],
    }


def split_handle(arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of `rebuild_cuda_tensor` as plain numbers and text. Raises ValueError for other arguments."""
    if len(arguments) != len(REBUILD):
        raise ValueError(f"torch gives {len(arguments)} values for a CUDA tensor, not {len(REBUILD)}")
    given = dict(zip(REBUILD, arguments, strict=True))
    return {
        "size": list(given["tensor_size"]),
        "stride": list(given["tensor_stride"]),
        **{name: int(given[name]) for name in _NUMBERS},
        **{name: base64.b64encode(given[name]).decode() for name in _BYTES},
    }


def rebuild_arguments(plain: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `rebuild_cuda_tensor`, with classes named here. Raises ValueError for a malformed handle."""
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


class _AsModule(torch.nn.Module):
    """The part of a module that vLLM's `ModuleSource` reads."""

    def __init__(self, staged: Staged) -> None:
        super().__init__()
        self._staged = staged

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return self._staged.named_parameters()


class _Concurrent:
    """A call that runs in a thread while another call runs, as both sides of an NCCL call must."""

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
        self._thread.join()  # the control's calls have deadlines
        if self._error is not None:
            raise self._error


def _watched(staged: Staged, control: Control) -> Iterator[tuple[str, Tensor]]:
    """The tensors to send, each of which is progress."""
    for pair in staged.on_device():
        control.progressed()
        yield pair


def _on_device(staged: Staged) -> None:
    """Select the sending device for this thread: vLLM takes the thread's current device; and streams of its own, so
    that a link that stands still stands in nobody's way."""
    own_streams()
    if staged.device.type == "cuda":
        torch.cuda.set_device(staged.device)
        torch.cuda.set_stream(torch.cuda.Stream(staged.device))


def own_streams() -> None:
    """vLLM (since 0.32) keeps the streams of its packing for the whole process, where the transfers of all links would
    queue behind the one that stands still. Each thread, that is each link, gets its own."""
    packing = sys.modules.get("vllm.distributed.weight_transfer.packed_tensor")  # vLLM's sending side imports it
    make = getattr(getattr(packing, "_get_streams", None), "__wrapped__", None)
    if make is not None:
        packing._get_streams = _PerThread(make)  # type: ignore[union-attr]


class _PerThread:
    """A function whose results each thread keeps for itself."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept = threading.local()

    def __call__(self, *given: Any) -> Any:
        kept: dict[Any, Any] = self._kept.__dict__
        key = str(given)
        if key not in kept:
            kept[key] = self._make(*given)
        return kept[key]


def _abort(group: Any) -> None:
    """Call ncclCommAbort: it ends all waits of this process in this communicator."""
    if group is not None:
        group.destroy()
