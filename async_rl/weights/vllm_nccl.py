"""A `Communicator` over NCCL, by vLLM's wrapper of NCCL's library, in a group of its own. It was not run on a GPU yet:
the same calls were, by a stand-in that keeps what the wrapper promises (tests/weights/test_broadcast.py)."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from async_rl.weights.communicator import GroupEnded, Meeting
from async_rl.wire.endpoint import LOOPBACK

ABORT_S = 1.0
"""longest wait for a call of the library to come back before the communicator is aborted under it"""


class NcclCommunicator:
    """`Communicator` between GPUs. What is begun goes to the calling thread's current stream, behind what that stream
    has been given and before what it is given next."""

    def __init__(self, device: torch.device, meeting: Meeting) -> None:
        """Returns when all members have called it."""
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        torch.cuda.set_device(device)
        # with what each release needs so that NCCL reads its environment alike in trainer and workers
        self._nccl = stateless_init_process_group(LOOPBACK, meeting.opened, meeting.rank, meeting.size, device)
        if self._nccl.disabled:  # the library is not there, or VLLM_DISABLE_PYNCCL is set
            raise GroupEnded("vLLM finds no NCCL")
        self._event: Any = None
        self._aborted = False
        self._using = threading.Lock()
        """held while NCCL's library has the communicator in its hands"""

    def begin(self, buffer: Tensor) -> None:
        with self._using:
            if self._aborted:  # the wrapper would do nothing, without a word
                raise GroupEnded("the group was aborted")
            stream = torch.cuda.current_stream(buffer.device)
            self._nccl.broadcast(buffer, src=0, stream=stream)
            self._event = stream.record_event()

    def done(self) -> bool:
        finished = bool(self._event.query())
        if self._aborted:  # asked afterwards: an abort ends the kernel, too
            raise GroupEnded("the group was aborted")
        return finished

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        free = self._using.acquire(timeout=ABORT_S)  # else it is stuck in there, which the abort ends
        try:
            self._nccl.destroy()  # ncclCommAbort, which also ends a kernel that waits
        finally:
            if free:
                self._using.release()
