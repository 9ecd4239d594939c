"""The trainer's ranks: who this process is among them, and the few collectives that training needs.

In the order of the file: `Ranks` with its exchanges; from rows of this rank to columns, gradients and norms of the
whole batch; weights that FSDP2 has split, gathered for use. Shapes: T policy tokens, I trajectories of the whole batch.

Who waits for whom: in every collective each rank waits for all others, `timeout_s` at most; then, or when a rank is
gone, RunFailed names the exchange. With one rank nothing of torch.distributed is touched. Only bytes and tensors
travel, never pickled objects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from async_rl.errors import RunFailed, UserError
from async_rl.process import MISSED
from async_rl.trainer.packing import PackedBatch
from async_rl_kernels import LogProbs

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


BUCKET_ELEMENTS = 1 << 25
"""elements of gradients that are summed in one exchange"""
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""what torchrun puts into the environment of each rank"""


class Ranks:
    """This process among the trainer's ranks.

    Example: `with join_ranks("cpu", 600.0) as ranks: learner = make_learner(settings, ranks)`.
    rank: 0 <= rank < size; rank 0 leads. mesh: one dimension over all ranks, None with one rank.
    """

    def __init__(self, *, rank: int, size: int, mesh: DeviceMesh | None, timeout_s: float) -> None:
        assert 0 <= rank < size
        assert (mesh is None) == (size == 1)
        self.rank = rank
        self.size = size
        self.mesh = mesh
        self.timeout_s = timeout_s
        """longest wait of a rank for the others in one collective"""
        self.waited_s = 0.0
        """spent in exchanges so far, most of it waiting for the slowest rank"""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """The leader's bytes, on every rank; the others' argument is ignored. Collective, as all that follow."""
        assert not self.leads or payload is not None
        if self.mesh is None:
            return payload or b""
        with self._exchange("bytes of rank 0"):
            size = torch.tensor([len(payload) if self.leads and payload is not None else 0])
            dist.broadcast(size, src=0)
            column = torch.empty(int(size), dtype=torch.uint8)
            if self.leads and payload:
                column.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            if len(column):
                dist.broadcast(column, src=0)
        return column.numpy().tobytes()

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` by the leader's values; shape, dtype and kind of device are the same on every rank."""
        if self.mesh is not None:
            with self._exchange("a tensor of rank 0"):
                dist.broadcast(tensor, src=0)
        return tensor

    def gather_rows(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """Rows of all ranks, in rank order, on every rank: [lengths[rank], ...] -> [sum of lengths, ...].

        `lengths` is the same on every rank; a rank may have no rows.
        """
        assert len(lengths) == self.size
        assert len(rows) == lengths[self.rank]
        if self.mesh is None:
            return rows
        longest = max(lengths)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in lengths]
        with self._exchange("rows of every rank"):
            dist.all_gather(every, padded)
        return torch.cat([part[:length] for part, length in zip(every, lengths, strict=True)])

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` (any shape) with its sum over ranks, the same bits on every rank."""
        if self.mesh is not None:
            with self._exchange("a sum over the ranks"):
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_tensor(torch.zeros(1))

    def close(self) -> None:
        """Leave the process group. No collective may be under way or follow.

        A process that ends normally without it can abort ("terminate called without an active exception"), because
        torch's threads still run when their objects are destroyed. The run's processes end by os._exit (process.py),
        which destroys nothing.
        """
        if self.mesh is not None:
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an exception nothing is closed: NCCL would wait for a collective that is under way, until it aborts
        this process before the process has reported why it ends."""
        if kind is None:
            self.close()

    @contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # what torch.distributed raises for a lost or late peer
            raise RunFailed(
                f"rank {self.rank} of {self.size} {MISSED} {what}: a rank is gone or did not come within "
                f"{self.timeout_s:g} s ({str(error).splitlines()[0]})"
            ) from None
        finally:
            self.waited_s += time.perf_counter() - started


def one_rank() -> Ranks:
    """The ranks of a trainer with one process."""
    return Ranks(rank=0, size=1, mesh=None, timeout_s=0.0)


def join_ranks(device: str | torch.device, timeout_s: float) -> Ranks:
    """Become one of the ranks that torchrun (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) started.

    It waits for the others: gloo for tensors on a CPU, nccl for those on a GPU. On CUDA it takes the GPU of LOCAL_RANK
    among the visible ones unless `device` names one. With WORLD_SIZE 1, or without these variables, this is the only
    rank. Raises UserError where they are incomplete, RunFailed when not all ranks come within `timeout_s`.
    """
    given = [name for name in LAUNCHED if os.environ.get(name)]
    if not given or os.environ.get("WORLD_SIZE") == "1":
        return one_rank()
    if missing := [name for name in LAUNCHED if name not in given]:
        raise UserError(
            f"{', '.join(missing)} is not in the environment, though {given[0]} is; start trainer ranks with torchrun"
        )
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kind = torch.device(device)
    if kind.type == "cuda":
        torch.cuda.set_device(kind.index if kind.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit)
        mesh = init_device_mesh(kind.type, (size,), mesh_dim_names=("ranks",))
        ranks = Ranks(rank=rank, size=size, mesh=mesh, timeout_s=timeout_s)
        ranks.barrier()
    except (RuntimeError, ValueError) as error:
        raise RunFailed(f"rank {rank} of {size} did not find the others: {str(error).splitlines()[0]}") from None
    return ranks


# From the rows that each rank computed to columns, gradients and norms of the whole batch, on every rank.


def whole_column(own: Tensor, batch: PackedBatch, ranks: Ranks) -> Tensor:
    """A column of the batch from the rows of this rank: [own policy tokens, ...] -> [T, ...], without a graph."""
    share = batch.share
    if share is None:
        return own
    every = ranks.gather_rows(own, share.policy_of_rank)
    return torch.empty_like(every).index_copy_(0, share.every_policy, every)


def whole_log_probs(own: LogProbs, batch: PackedBatch, ranks: Ranks) -> LogProbs:
    """Columns [T] of the batch from those of this rank; `own` itself where this rank has the whole batch."""
    if batch.share is None:
        return own
    columns = [own.log_prob.detach(), own.entropy.detach(), own.prob_square_sum]
    columns += [] if own.log_proxy is None else [own.log_proxy]
    log_prob, entropy, square, *proxy = whole_column(torch.stack(columns, 1), batch, ranks).T.contiguous()
    return LogProbs(log_prob=log_prob, entropy=entropy, prob_square_sum=square, log_proxy=proxy[0] if proxy else None)


def whole_trajectories(own: Tensor, batch: PackedBatch, ranks: Ranks) -> Tensor:
    """[own trajectories] -> [I]; 0 for trajectories without policy tokens, which no rank runs."""
    share = batch.share
    if share is None:
        return own
    every = ranks.gather_rows(own, share.trajectories_of_rank)
    return every.new_zeros(batch.num_trajectories).index_copy_(0, share.every_trajectory, every)


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Make `.grad` of parameters that every rank holds whole the sum over ranks.

    Where a parameter has a gradient on some rank, it gets one on all. Gradients of sharded parameters are summed where
    they are formed.
    """
    if ranks.mesh is None:
        return
    plain = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    held = ranks.sum_tensor(torch.tensor([float(p.grad is not None) for p in plain]))
    given = [p for p, count in zip(plain, held.tolist(), strict=True) if count]
    for bucket in _buckets(given):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        ranks.sum_tensor(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, [] float32; each is whole or sharded (then it is a collective)."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients)
    found = torch.nn.utils.get_total_norm(sharded)
    assert isinstance(found, DTensor)
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    parts = [found.full_tensor(), *([torch.nn.utils.get_total_norm(plain)] if plain else [])]
    return torch.linalg.vector_norm(torch.stack(parts)) if plain else parts[0]


def clip_gradient(parameters: Sequence[nn.Parameter], limit: float, ranks: Ranks) -> float:
    """Global L2 norm of the gradient, which is scaled down to `limit` when that is above 0 and exceeded.

    Every rank returns the leader's norm, to the last bit.
    """
    norm = ranks.broadcast_tensor(total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit > 0:
        # apart: one operation over many tensors takes no mixture of both
        for sharded in (False, True):
            chosen = [p for p in parameters if isinstance(p, DTensor) == sharded]
            if chosen:
                torch.nn.utils.clip_grads_with_norm_(chosen, limit, norm)
    return float(norm)


def full(tensor: Tensor) -> Tensor:
    """A parameter or moment as one tensor of its whole shape; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter; the whole of it where it is not sharded. Writing into it changes that."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype and device, BUCKET_ELEMENTS at most."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        first = bucket[0] if bucket else parameter
        alike = (first.dtype, first.device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or filled + parameter.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += parameter.numel()
    if bucket:
        yield bucket


# Weights that FSDP2 has split over the ranks (sharding.py): gathered for use and freed again.


def is_sharded(model: object) -> bool:
    """Whether FSDP2 has split the model's weights over ranks."""
    return isinstance(model, FSDPModule)


def gather_head(model: object) -> None:
    """Gather `model.head`, for a backward that uses it first. Collective where it is split."""
    if isinstance(model, FSDPModule):
        model.unshard()


def free(model: object) -> None:
    """Free gathered weights of embedding, last norm and head; the module's parameters are the sharded ones again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def keep_head_after_backward(model: object) -> None:
    """Keep the head gathered after a backward, for gradients that are formed from it later; then call `free`."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(False, recurse=False)
