"""In which dtype, and with which attention kernel, the trainer computes the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from async_rl.model.attention import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArithmetic:
    """In which precision and at which temperature a forward is computed."""

    temperature: float
    """of the distribution that the generators sampled from, whose log-probs are wanted; turns that have one of their
    own are computed at that (`MicroBatch.stretch`)"""
    dtype: torch.dtype = torch.float32
    """bfloat16 runs the model under autocast; weights stay as they are"""
    kernel: Kernel | None = None
    """computes attention among packed documents; None: SDPA"""
    lanes: int = 1
    """parts of a micro-batch that are computed side by side"""

    def products(self, device: torch.device) -> torch.dtype | None:
        """The dtype that the head's inputs are rounded to; None: as they are.

        On a GPU it is that of all other layers under autocast, since float32 products take ten times as long there;
        sums and logits are float32 all the same. On a CPU nothing is rounded.
        """
        return self.dtype if self.dtype == torch.bfloat16 and device.type == "cuda" else None

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the model's forward runs."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()
