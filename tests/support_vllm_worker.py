"""What tests mix into vLLM's worker: ours, and its process id."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler

from async_rl.generator.vllm_worker import Weights


class WithPid(Weights):
    def async_rl_pid(self) -> int:
        return os.getpid()


class WithFault(Weights):
    def async_rl_spoil(self, name: str, rank: int) -> None:
        """Change vLLM's parameter `name` in one worker."""
        if self.rank == rank:
            dict(self.get_model().named_parameters())[name].data.add_(1e-3)


class WithCount(Weights):
    """Also mends vLLM 0.32 on a CPU, which writes each guess's temperature into a copy and reads it from memory that
    nobody wrote (vllm/utils/cpu_triton_utils.py: _expand_kernel_impl)."""

    _steps = 0

    def async_rl_steps(self) -> int:
        """Model steps since this was first asked."""
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        if not self._steps:
            self._steps, inner = 1, self.execute_model  # type: ignore[attr-defined, has-type]

            def counted(*given: object, **named: object) -> object:
                self._steps += 1
                return inner(*given, **named)

            self.execute_model = counted
        return self._steps


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """x [requests] -> [num_tokens]: the value of each guess's request."""
    found = torch.repeat_interleave(x, torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long())
    assert len(found) == num_tokens
    return torch.where(found == replace_from, torch.full_like(found, replace_to), found)
