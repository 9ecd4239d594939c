"""Products through oneDNN are products."""

from __future__ import annotations

import pytest
import torch

from async_rl.model.decoder import Linear, add_linear, linear


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


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("frozen", ["none", "weight", "x"])
def test_gradients_of_linear_are_those_of_torch(rows, frozen):
    generator = torch.Generator().manual_seed(rows)
    ours, theirs = Linear(96, 300), torch.nn.Linear(96, 300)
    theirs.load_state_dict(ours.state_dict())
    x, weight = (torch.randn(rows, size, generator=generator) for size in (96, 300))
    inputs = [x.clone().requires_grad_(frozen != "x") for _ in range(2)]
    outputs = []
    for layer, given in zip((ours, theirs), inputs, strict=True):
        layer.weight.requires_grad_(frozen != "weight")
        out = layer(given)
        (out * weight).sum().backward()
        outputs.append(out)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    pairs = [(inputs[0].grad, inputs[1].grad), (ours.weight.grad, theirs.weight.grad)]
    pairs.append((ours.bias.grad, theirs.bias.grad))
    for found, expected in pairs:
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_linear_follows_autocast():
    layer, x = Linear(96, 300), torch.randn(400, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
