"""Matrix products whose sums are float32 or better, whatever the inputs are.

On a CPU torch sends float32 products to MKL. On AMD processors MKL stays below half of what oneDNN reaches with
the same weights (measured: 105 against 230 GFLOP/s on one core, 360 rows), so products go through oneDNN there. It
costs a few microseconds more a call, so small ones stay where they are. On Intel's processors MKL is the faster one
(measured, one core, GFLOP/s of MKL and oneDNN: 64 rows of 128 x 704 144 and 119, of 128 x 128 122 and 65; the
gradient of a weight from 1000 rows of 128 x 704 164 and 92), and products of few rows are faster still where the
weight is stored as [in, out] (64 rows of the matrices of SmolLM2: 137 instead of 98). On CUDA bfloat16 inputs are
multiplied as they are and the float32 sums are written out, not rounded to bfloat16.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORTHWHILE = 800_000
"""multiplications from which oneDNN's faster product outweighs its dearer call"""
CPU_INFO = Path("/proc/cpuinfo")


def prefers_mkl() -> bool:
    """Whether MKL is the faster library on this processor: torch has it, and the processor is Intel's."""
    return torch.backends.mkl.is_available() and CPU_INFO.is_file() and "GenuineIntel" in CPU_INFO.read_text()


PREFERS_MKL = prefers_mkl()
USES_ONEDNN = (
    not PREFERS_MKL and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def backend(device: torch.device | str) -> str:
    """Which kernels a device gets: "triton" or "torch".

    Only CUDA has Triton's, and only where Triton is installed, as it is beside every CUDA build of torch. Triton is
    not imported to find out."""
    return "triton" if torch.device(device).type == "cuda" and find_spec("triton") is not None else "torch"


def uses_triton(x: Tensor) -> bool:
    """Whether a tensor goes to Triton's kernels; float64 is left to torch."""
    return x.dtype != torch.float64 and backend(x.device) == "triton"


def uses_triton_products(x: Tensor) -> bool:
    """Whether a tensor goes to Triton's kernels with products in them, which are for the 16-bit dtypes."""
    return x.dtype in (torch.bfloat16, torch.float16) and backend(x.device) == "triton"


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether x @ weight.T goes through oneDNN. x [rows, in], weight [out, in]."""
    return (
        USES_ONEDNN
        and x.dim() == 2
        and x.shape[0] * weight.numel() >= WORTHWHILE
        and x.dtype == torch.float32
        and x.device.type == "cpu"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias [rows, out], without autograd. x [rows, in], weight [out, in], bias [out]."""
    if worthwhile(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_linear(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + features @ weight.T + bias, without autograd. x [rows, out], features [rows, in], weight [out, in], bias
    [out] -> [rows, out]."""
    if worthwhile(features, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(features, x, weight, bias, "add")
    out = torch.addmm(x, features, weight.t())
    return out if bias is None else out.add_(bias)


def promoted(x: Tensor) -> Tensor:
    """x in float32; float64 stays float64. Any shape."""
    return x if x.dtype == torch.float64 else x.float()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T [rows, out] in float32 or better, without autograd. x [rows, in], weight [out, in] of one dtype."""
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return linear(promoted(x), promoted(weight))


def batched_product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T of each pair, [batch, rows, others], in float32 or better.

    x [batch, rows, in], y [batch, others, in] of one dtype.
    """
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(x, y.mT, out_dtype=torch.float32)
    return torch.bmm(promoted(x), promoted(y).mT)


def put_product(total: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """total = left @ right, or total += left @ right, in the dtype of `total` (float32 or better).

    total [rows, out], left [rows, in], right [in, out].
    """
    if total.device.type == "cuda":
        beta = 1.0 if add else 0.0  # with 0 whatever total holds is not read
        if left.dtype == total.dtype:
            torch.addmm(total, left, right, beta=beta, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
        return
    left, right = left.to(total.dtype), right.to(total.dtype)
    if not worthwhile(left, right.T):
        torch.addmm(total, left, right, beta=1.0 if add else 0.0, out=total)
        return
    value = linear(left, right.T)
    if add:
        total.add_(value)
    else:
        total.copy_(value)
