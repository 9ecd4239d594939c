"""A head cut along the vocabulary over two ranks gives what the whole head gives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from async_rl_kernels import linear_logprob
from async_rl_kernels.logprob import Shard

CUT = 40
TOKENS, HIDDEN, VOCABULARY = 13, 8, 97


def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    w = torch.randn(VOCABULARY, HIDDEN, generator=random, dtype=torch.float64)
    y = torch.randint(VOCABULARY, (TOKENS,), generator=random)
    y[0], y[1], y[2] = 0, CUT - 1, CUT
    return h, w, y, torch.randn(3, TOKENS, generator=random, dtype=torch.float64)


def one_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)  # no thread pool survives a fork
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    h, w, y, up = make()
    whole_h, whole_w = h.clone().requires_grad_(), w.clone().requires_grad_()
    mine = slice(0, CUT) if rank == 0 else slice(CUT, VOCABULARY)
    part_h, part_w = h.clone().requires_grad_(), w[mine].clone().requires_grad_()
    assert dist.group.WORLD is not None
    want = linear_logprob(whole_h, whole_w, y, temperature=0.6)
    got = linear_logprob(part_h, part_w, y, temperature=0.6, shard=Shard(start=mine.start, group=dist.group.WORLD))
    for found in (want, got):
        loss = (torch.stack([found.log_prob, found.entropy, found.prob_square_sum]) * up).sum()
        loss.backward()
    torch.testing.assert_close(
        (got.log_prob, got.entropy, got.prob_square_sum), (want.log_prob, want.entropy, want.prob_square_sum)
    )
    assert whole_w.grad is not None
    torch.testing.assert_close((part_h.grad, part_w.grad), (whole_h.grad, whole_w.grad[mine]), rtol=1e-9, atol=1e-10)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_with_half_a_vocabulary_each_equal_one_with_all_of_it(tmp_path: Path) -> None:
    mp.start_processes(one_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2, start_method="fork")
