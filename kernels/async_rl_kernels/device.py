"""Which of two ways an operation takes: Triton on CUDA, torch operations elsewhere."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def backend(device: torch.device | str) -> str:
    """"triton" or "torch". Only CUDA has the former, and only where Triton is installed, as it is beside every
    CUDA build of torch; it is not imported to find out."""
    return "triton" if torch.device(device).type == "cuda" and find_spec("triton") is not None else "torch"


def uses_triton(x: Tensor) -> bool:
    """float64 is left to torch."""
    return x.dtype != torch.float64 and backend(x.device) == "triton"


def uses_triton_products(x: Tensor) -> bool:
    """Kernels with products in them are for the 16-bit dtypes."""
    return x.dtype in (torch.bfloat16, torch.float16) and backend(x.device) == "triton"
