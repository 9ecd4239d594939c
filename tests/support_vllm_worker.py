"""What tests mix into vLLM's worker: ours, and its process id."""

from __future__ import annotations

import os

from async_rl.generator.vllm_worker import Weights


class WithPid(Weights):
    def async_rl_pid(self) -> int:
        return os.getpid()


class WithFault(Weights):
    def async_rl_spoil(self, name: str, rank: int) -> None:
        """Change vLLM's parameter `name` in one worker."""
        if self.rank == rank:
            dict(self.get_model().named_parameters())[name].data.add_(1e-3)
