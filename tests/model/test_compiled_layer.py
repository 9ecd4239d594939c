"""The compiled parts of a layer against its modules in float64, and where the modules serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support_models import llama_config, make_decoder, qwen2_config, qwen3_config
from torch import Tensor

from async_rl.model import compiled_layer, decoder
from async_rl.model.attention import DocumentAttention
from async_rl.model.decoder import (
    Layer,
    LayerExecution,
    after_at_once,
    after_attention,
    before_at_once,
    before_attention,
    plain_weights,
)
from async_rl_kernels import native, product

pytestmark = pytest.mark.skipif(
    native.library() is None or native.gemm() is None, reason="no C compiler, or torch shows no products"
)
CONFIGS = {"qwen3": qwen3_config(hidden=48, heads=6, kv_heads=2, head_dim=16, intermediate=72), "llama": llama_config()}


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFERS_MKL", True)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(name: str, dtype: torch.dtype) -> tuple[Layer, tuple[Tensor, Tensor]]:
    model = make_decoder(CONFIGS[name]).to(dtype)
    layer = model.model.layers[1]
    assert isinstance(layer, Layer)
    return layer, model.rotation(torch.arange(700), dtype)


def serves(layer: Layer, x: Tensor) -> bool:
    weights = plain_weights(layer)
    return bool(weights) and compiled_layer.serves(x, weights, layer.self_attn.head_dim)


def results(layer: Layer, turn: tuple[Tensor, Tensor], rows: int, *, compiled: bool, frozen: str = "") -> list[Tensor]:
    """Outputs of both parts, and the gradients of all that enters them."""
    at = layer.self_attn
    dtype = at.q_proj.weight.dtype
    x = drawn(rows, 2, at.q_proj.in_features, seed=1).to(dtype)[:, 1].requires_grad_()  # rows that are not neighbours
    out = drawn(rows, at.q_proj.out_features // at.head_dim, at.head_dim, seed=2).to(dtype).requires_grad_()
    cos, sin = (part[:rows] for part in turn)
    before, after = before_attention, after_attention
    if compiled:
        before, after = before_at_once, after_at_once
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    made = [*before(layer, x, cos, sin), after(layer, x, out)]
    pulls = [drawn(*one.shape, seed=3 + i).to(dtype) for i, one in enumerate(made)]
    asked = [x, out, *(p for p in layer.parameters() if p.requires_grad)]
    return [*(one.detach() for one in made), *torch.autograd.grad(made, asked, pulls)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 255, 600])
def test_values_and_gradients(name: str, rows: int, threads: int) -> None:
    """600 rows are three blocks. No further from float64 than a few roundings of sums of so many."""
    layer, turn = layer_of(name, torch.float32)
    assert serves(layer, drawn(rows, layer.self_attn.q_proj.in_features))
    found = results(layer, turn, rows, compiled=True)
    exact = results(*layer_of(name, torch.float64), rows, compiled=False)
    modules = results(layer, turn, rows, compiled=False)
    for one, other, right in zip(found, modules, exact, strict=True):
        assert one.shape == right.shape
        size = float(right.abs().max())
        assert float((one.double() - right).abs().max()) <= 2e-6 * size + 3 * float((other - right).abs().max())


@pytest.mark.parametrize("frozen", ["q_proj", "norm", "mlp", "self_attn"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    layer, turn = layer_of("qwen3", torch.float32)
    found = results(layer, turn, 300, compiled=True, frozen=frozen)
    right = results(layer, turn, 300, compiled=False, frozen=frozen)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * float(other.abs().max()))


def test_the_same_bits_every_time_and_again_in_the_backward_pass(threads: int) -> None:
    layer, turn = layer_of("qwen3", torch.float32)
    one, other = (results(layer, turn, 600, compiled=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_decoder_uses_them_where_its_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    used = decoder.compute_after

    def counted(*arguments: Any) -> Tensor:
        calls.append("after")
        return used(*arguments)

    monkeypatch.setattr(decoder, "compute_after", counted)
    model = make_decoder(qwen3_config())
    tokens, attention = torch.arange(30), DocumentAttention([10, 20])

    def hidden() -> tuple[Tensor, int]:
        calls.clear()
        return model(tokens, tokens % 10, attention), len(calls)

    plain, used_in = hidden()
    assert used_in == 2
    model.set_execution(LayerExecution(checkpointed=True))
    again, used_in = hidden()
    assert used_in == 2
    assert torch.equal(again, plain)
    model.set_execution(LayerExecution())
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    inner = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    hooked, used_in = hidden()
    assert used_in == 0
    assert seen == ["mlp", "up"]
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-4)
    handle.remove()
    inner.remove()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)  # as an adapter stands in its place
    assert hidden()[1] == 1
    monkeypatch.setattr(native, "usable", lambda *_: False)
    assert hidden()[1] == 0


@pytest.mark.parametrize("make", [lambda: make_decoder(qwen2_config()), lambda: make_decoder(qwen3_config()).double()])
def test_biases_and_other_dtypes_are_left_to_the_modules(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    layer = model.model.layers[0]
    assert not serves(layer, drawn(4, 32).to(layer.self_attn.q_proj.weight.dtype))


def test_less_is_kept_for_the_backward_pass() -> None:
    layer, turn = layer_of("qwen3", torch.float32)
    x = drawn(512, 48).requires_grad_()
    out = drawn(512, 6, 16).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counts = []
    for before, after in ((before_attention, after_attention), (before_at_once, after_at_once)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = [*before(layer, x, *(part[:512] for part in turn)), after(layer, x, out)]
        counts.append(sum(kept.values()))
        del made
    assert counts[1] < 0.85 * counts[0]
