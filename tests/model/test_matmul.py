"""Products through either library are products."""

from __future__ import annotations

import pytest
import torch

from async_rl.model.decoder import Linear
from async_rl_kernels import product
from async_rl_kernels.product import add_linear, linear


@pytest.fixture(params=["onednn", "mkl"])
def library(request, monkeypatch):
    """Both libraries, whatever the processor prefers."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(product, "USES_ONEDNN", request.param == "onednn")
    return request.param


@pytest.mark.parametrize(
    ("vendor", "preferred"), [("GenuineIntel", torch.backends.mkl.is_available()), ("AuthenticAMD", False)]
)
def test_mkl_is_preferred_on_intels_processors_alone(vendor, preferred, tmp_path, monkeypatch):
    monkeypatch.setattr(product, "CPU_INFO", tmp_path / "cpuinfo")
    assert not product.prefers_mkl()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert product.prefers_mkl() == preferred


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("rows", [3, 500])
def test_a_product_is_put_or_added_in_place(library, rows, add):
    generator = torch.Generator().manual_seed(rows)
    total, left, right = (torch.randn(s, generator=generator) for s in ((64, 80), (64, rows), (rows, 80)))
    expected = left.double() @ right.double() + (total.double() if add else 0)
    if not add:
        total.fill_(float("nan"))  # it is not read
    product.put_product(total, left, right, add=add)
    assert torch.allclose(total.double(), expected, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40, 400])
@pytest.mark.parametrize("biased", [True, False])
def test_both_ways_of_multiplying_agree_with_float64(library, rows, biased):
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
def test_gradients_of_linear_are_those_of_torch(library, rows, frozen):
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
