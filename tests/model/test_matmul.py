"""Products through oneDNN are products."""

from __future__ import annotations

import pytest
import torch

from async_rl.model.matmul import add_linear, linear


@pytest.mark.parametrize("rows", [1, 40, 400])
@pytest.mark.parametrize("biased", [True, False])
def test_both_ways_of_multiplying_agree_with_float64(rows, biased):
    generator = torch.Generator().manual_seed(rows)
    x, weight, added, bias = (
        torch.randn(shape, generator=generator) for shape in ((rows, 96), (300, 96), (rows, 300), (300,))
    )
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    with torch.no_grad():
        assert torch.allclose(linear(x, weight, bias if biased else None).double(), exact, atol=1e-4)
        found = add_linear(added, x, weight, bias if biased else None)
    assert torch.allclose(found.double(), exact + added, atol=1e-4)
