"""Tensors between processes without GPUs, and what takes vLLM's place on both ends of a link."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from async_rl.errors import RunFailed
from async_rl.weights.canary import fingerprint
from async_rl.weights.link import Control, Staged
from async_rl.wire.endpoint import LOOPBACK, free_port

WAIT = timedelta(seconds=60)
SOON = timedelta(seconds=8)
"""a group that was aborted lives on so long where something was under way"""


class GlooCommunicator:
    """What the engines use of vLLM's PyNcclCommunicator."""

    def __init__(self, host: str, port: int, rank: int, size: int, wait: timedelta = WAIT) -> None:
        store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=WAIT)
        self._group = dist.ProcessGroupGloo(store, rank, size, wait)
        self._aborted = threading.Event()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        work = self._group.broadcast([tensor], options)
        while not work.is_completed():
            if self._aborted.wait(0.001):
                raise RuntimeError("the communicator was aborted")
        try:
            work.wait()
        except RuntimeError:  # gloo notices that the other side is gone; NCCL would wait on
            self._aborted.wait()
            raise

    def destroy(self) -> None:
        """As ncclCommAbort: whoever waits in it waits no longer."""
        self._aborted.set()
        self._group.abort()  # else its end would wait for what is under way


class FakeTrainerSide:
    """A `WeightLink` with the contract of vLLM 0.32's NCCLTrainerWeightTransferEngine: init beside opening the
    endpoint; then start, update beside the broadcasts, finish."""

    def __init__(self, control: Control, staged: Staged, *, workers: int = 1) -> None:
        self.control, self.staged, self.workers = control, staged, workers
        self.group: GlooCommunicator | None = None
        self.between: Callable[[int], None] = lambda _: None
        """called before each tensor with its number"""

    def offer(self) -> None:
        port = free_port()
        init = {"master_address": LOOPBACK, "master_port": port, "rank_offset": 1, "world_size": 1 + self.workers}
        with ThreadPoolExecutor(1) as beside:
            future = beside.submit(self.control.init_weight_transfer_engine, init)
            self.group = GlooCommunicator(LOOPBACK, port, 0, 1 + self.workers, SOON)
            future.result()

    def send(self) -> None:
        assert self.group is not None
        named = list(self.staged.named_parameters())
        update = {
            "names": [name for name, _ in named],
            "dtype_names": [str(tensor.dtype).split(".")[-1] for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
        }
        self.control.start_weight_update()
        beside = ThreadPoolExecutor(1)
        try:
            future = beside.submit(self.control.update_weights, update)
            for number, (_, tensor) in enumerate(named):
                self.between(number)
                self.group.broadcast(tensor, src=0)
            future.result()
        finally:
            beside.shutdown(wait=False)
        self.control.finish_weight_update()

    def close(self) -> None:
        if self.group is not None:
            self.group.destroy()


class FakeWorker:
    """The contract of vLLM 0.32's worker and its NCCL engine: what it refuses, and in which words."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = {name: tensor.clone() for name, tensor in held.items()}
        self.group: GlooCommunicator | None = None
        self.active = False
        self.calls: list[str] = []
        self.between: Callable[[int], None] = lambda _: None

    def do(self, method: str, detail: Mapping[str, Any]) -> None:
        self.calls.append(method)
        match method:
            case "init":
                size, rank = detail["world_size"], detail["rank_offset"]
                self.group = GlooCommunicator(detail["master_address"], detail["master_port"], rank, size, SOON)
            case "start":
                if self.active:
                    raise RuntimeError("start_weight_update called while a weight update is already active.")
                self.active = True
            case "update":
                if not self.active:
                    raise RuntimeError("start_weight_update must be called before update_weights.")
                try:
                    self._receive(**detail)
                except BaseException:
                    self.active = False
                    raise
            case "finish":
                if not self.active:
                    raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
                self.active = False

    def _receive(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        if self.group is None:
            raise RuntimeError("NCCL weight transfer not initialized. Call init_transfer_engine() first.")
        if not len(names) == len(dtype_names) == len(shapes):
            raise ValueError("`dtype_names` should be of the same size as `names`")
        for number, (name, dtype, shape) in enumerate(zip(names, dtype_names, shapes, strict=True)):
            self.between(number)
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight, src=0)
            if name not in self.held or self.held[name].shape != weight.shape:
                raise ValueError(f"Attempted to load weight {name} {list(weight.shape)} into another parameter")
            self.held[name].copy_(weight)


class FakeEngine:
    """What `LinkSource` sees of an engine with links: calls that block run beside the event loop, as vLLM's do."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.worker = FakeWorker(held)
        self.version = 0

    async def handle_call(self, method: str, version: int, detail: Mapping[str, Any]) -> None:
        import asyncio

        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def work() -> None:
            error: Exception | None = None
            try:
                self.worker.do(method, detail)
            except Exception as raised:
                error = raised
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(lambda: done.cancelled() or _settle(done, error))

        threading.Thread(target=work, daemon=True).start()  # may be stuck for ever
        try:
            await done
        except Exception as error:
            raise RunFailed(f"vLLM failed in {method}: {error}") from error
        if method == "finish":
            self.version = version

    async def fingerprint(self) -> Mapping[str, int]:
        return fingerprint(self.worker.held, self.version)


def _settle(done: Any, error: Exception | None) -> None:
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
