"""Weights over NCCL, from the trainer's GPU to the workers of one vLLM on other GPUs, by vLLM's own trainer side.

Needs GPUs: not run yet. Its control flow was, with gloo in NCCL's place (tests/weights/test_vllm_link.py): vLLM's
`send_weights` and worker engine around a process group of the test.

vLLM meets over a TCPStore of its own, on the loopback and a port that is used once, and lets it carry a pickled
NCCL id: on a machine whose other users are not trusted, choose weights.transport=shared_memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from async_rl.vllm_release import TRAINER_FACTORY, Release
from async_rl.weights.link import Control
from async_rl.weights.staged import Staged
from async_rl.wire.endpoint import LOOPBACK, free_port

if TYPE_CHECKING:
    from torch import Tensor

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
