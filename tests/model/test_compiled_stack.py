"""Several layers as one compiled function against the modules in float64, and where the modules serve."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support_models import llama_config, make_decoder, qwen2_config, qwen3_config
from torch import Tensor

from async_rl.model import decoder, merged_attention
from async_rl.model.decoder import Decoder, LayerExecution
from async_rl.model.prefix_tree import PrefixTree, make_tree
from async_rl.model.tree_attention import TreeAttention
from async_rl_kernels import native, product

pytestmark = pytest.mark.skipif(
    native.library() is None or native.gemm() is None, reason="no C compiler, or torch shows no products"
)
CONFIGS = {
    "qwen3": qwen3_config(hidden=48, heads=6, kv_heads=2, head_dim=16, intermediate=72),
    "odd heads": qwen3_config(hidden=40, heads=3, kv_heads=1, head_dim=32, intermediate=56),
    "llama": llama_config(hidden=64, heads=4, kv_heads=4, head_dim=16),
}


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "PREFERS_MKL", True)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tree_of(groups: int, *, prompt: int = 20, answer: int = 23) -> PrefixTree:
    """Ragged groups, some of whose samples share more than the prompt."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(groups):
        begin = random.integers(0, 9, int(random.integers(1, prompt)))
        more = np.concatenate((begin, random.integers(0, 9, 9)))
        for sample in range(4):
            own = random.integers(0, 9, int(random.integers(1, answer)))
            documents.append(np.concatenate((more if sample > 2 else begin, own)).astype(np.int32))
    return make_tree(documents)


def hidden_of(model: Decoder, tree: PrefixTree, asked: Tensor | None) -> Tensor:
    ends = np.cumsum(tree.documents)
    places = np.arange(ends[-1]) - np.repeat(ends - tree.documents, tree.documents)
    positions = torch.from_numpy(places[tree.token_of_row])
    tokens = (torch.arange(tree.num_rows) * 7) % model.config.vocabulary
    hidden: Tensor = model(tokens, positions, TreeAttention(tree), asked)
    return hidden


def results(model: Decoder, tree: PrefixTree, asked: Tensor | None) -> list[Tensor]:
    """Hidden states, and the gradients of all parameters that are trained."""
    hidden = hidden_of(model, tree, asked)
    pull = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(hidden, trained, pull, allow_unused=True)  # a head of its own is not used
    return [hidden.detach(), *(gradient for gradient in gradients if gradient is not None)]


def modules_only(model: Decoder) -> Decoder:
    other = copy.deepcopy(model)
    other._at_once = lambda *_: None  # type: ignore[method-assign]
    return other


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers that were computed at once."""
    found: list[int] = []
    real = decoder.compute_layers

    def noted(*arguments: Any) -> Tensor:
        found.append(len(arguments[4]))
        return real(*arguments)

    monkeypatch.setattr(decoder, "compute_layers", noted)
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("groups", "large", "threads"), [(1, False, 1), (14, False, 1), (14, True, 1), (1, False, 2)], indirect=["threads"]
)
@pytest.mark.usefixtures("threads")
def test_values_and_gradients(
    name: str, groups: int, large: bool, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part and several; the first 300 rows of the latter are not asked for. Large weights: layer by layer."""
    if large:
        monkeypatch.setattr(decoder, "CACHED", 0)
    model, tree = make_decoder(CONFIGS[name]), tree_of(groups)
    asked = torch.arange(0 if groups == 1 else 300, tree.num_rows, 3)
    for rows in (None, asked):
        taken.clear()
        found = results(model, tree, rows)
        assert taken == ([1, 1] if large else [2])
        exact = results(modules_only(copy.deepcopy(model).double()), tree, rows)
        modules = results(modules_only(model), tree, rows)
        for one, other, right in zip(found, modules, exact, strict=True):
            size = float(right.abs().max())
            assert float((one.double() - right).abs().max()) <= 4e-6 * size + 3 * float((other - right).abs().max())
        again = results(model, tree, rows)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        with torch.no_grad():
            assert torch.equal(hidden_of(model, tree, rows), found[0])


@pytest.mark.parametrize("frozen", ["q_proj", "norm", "mlp", "embed"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    model, tree = make_decoder(CONFIGS["qwen3"]), tree_of(14)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for one, other in zip(results(model, tree, None), results(modules_only(model), tree, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * float(other.abs().max()))


def test_saved_tensors_may_lie_elsewhere_in_the_backward_pass() -> None:
    model, tree = make_decoder(CONFIGS["qwen3"]), tree_of(14)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        found = results(model, tree, None)
    assert all(torch.equal(a, b) for a, b in zip(found, results(model, tree, None), strict=True))


def test_where_the_modules_serve(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of(2)
    plain = make_decoder(CONFIGS["qwen3"])
    hooked, checkpointed, adapted = (copy.deepcopy(plain) for _ in range(3))
    seen: list[str] = []
    hooked.model.layers[1].register_forward_hook(lambda *_: seen.append("layer"))
    checkpointed.set_execution(LayerExecution(checkpointed=True))
    adapted.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 72, bias=False)
    for model in (hooked, checkpointed, adapted, make_decoder(qwen2_config())):
        results(model, tree, None)
    results(plain, tree, torch.arange(5).flip(0))  # rows that fall
    monkeypatch.setattr(merged_attention, "MOST_KEYS", 16)
    results(plain, tree, None)
    monkeypatch.undo()
    assert not taken
    assert seen


@pytest.mark.parametrize(("window", "serves"), [(8, False), (4096, True)])
def test_a_window_is_left_to_the_modules_where_it_cuts(window: int, serves: bool, taken: list[int]) -> None:
    model = make_decoder(replace(CONFIGS["qwen3"], windows=(0, window)))
    results(model, tree_of(2), None)
    assert bool(taken) == serves
