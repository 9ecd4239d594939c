"""RMSNorm and rotary embedding in few passes: values and gradients are those of torch's composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from async_rl.model.elementwise import rms_norm, rotate


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    toward = drawn(*out.shape, dtype=out.dtype, seed=9)
    return [out.detach(), *torch.autograd.grad((out * toward).sum(), inputs)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", [(5, 16), (7, 3, 8), (1, 64), (0, 16), (40, 1, 2)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])  # where eps rules, and where it does not matter
def test_rms_norm(shape: tuple[int, ...], size: float, dtype: torch.dtype, near: float) -> None:
    x = (drawn(*shape, dtype=dtype, seed=0) * size).requires_grad_()
    weight = drawn(shape[-1], dtype=dtype, seed=1).requires_grad_()
    found = gradients(rms_norm(x, weight, 1e-6), [x, weight])
    right = gradients(F.rms_norm(x, weight.shape, weight, 1e-6), [x, weight])
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.abs().max()) if len(x) else 0.0)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_rms_norm_forms_only_the_gradient_that_is_wanted(frozen: str) -> None:
    x, weight = drawn(6, 8, dtype=torch.float64, seed=0), drawn(8, dtype=torch.float64, seed=1)
    wanted = (weight if frozen == "x" else x).requires_grad_()
    right = gradients(F.rms_norm(x, weight.shape, weight, 1e-6), [wanted])
    found = gradients(rms_norm(x, weight, 1e-6), [wanted])
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("heads", [1, 3])
def test_rotation(heads: int) -> None:
    x = drawn(11, heads, 8, dtype=torch.float64, seed=0).requires_grad_()
    cos, sin = (drawn(11, 1, 8, dtype=torch.float64, seed=seed) for seed in (1, 2))
    plain = x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin
    torch.testing.assert_close(gradients(rotate(x, cos, sin), [x]), gradients(plain, [x]), rtol=1e-14, atol=1e-14)


def test_inputs_that_are_parts_of_others() -> None:
    """Query, key and value are often views of one product."""
    joint = drawn(6, 5, 8, dtype=torch.float64, seed=0).requires_grad_()
    part, weight = joint[:, 1:3], drawn(8, dtype=torch.float64, seed=1).requires_grad_()
    cos, sin = (drawn(6, 1, 8, dtype=torch.float64, seed=seed) for seed in (2, 3))
    found = gradients(rotate(rms_norm(part, weight, 1e-6), cos, sin), [joint, weight])
    normed = F.rms_norm(part, weight.shape, weight, 1e-6)
    plain = normed * cos + torch.cat((normed[..., 4:], normed[..., :4]), -1) * sin
    torch.testing.assert_close(found, gradients(plain, [joint, weight]), rtol=1e-12, atol=1e-12)
