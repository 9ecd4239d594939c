"""What tests mix into vLLM's worker: ours, and its process id."""

from __future__ import annotations

import os

from async_rl.generator.vllm_worker import Weights


class WithPid(Weights):
    def async_rl_pid(self) -> int:
        return os.getpid()
