"""The compiled functions against torch's operations in float64, and what serves where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from async_rl.generator.kv_blocks import BlockTables
from async_rl.generator.kv_cache import CacheAttention, Feed, KVCache, Places
from async_rl.model import elementwise
from async_rl.model.merged_attention import CompiledParts, TreeParts
from async_rl.model.prefix_tree import make_tree
from async_rl_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def without() -> Iterator[None]:
    """No compiled functions."""
    native.library.cache_clear()
    os.environ["ASYNC_RL_NATIVE"] = "0"
    yield
    del os.environ["ASYNC_RL_NATIVE"]
    native.library.cache_clear()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def same(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 2e-6
) -> None:
    """Results and gradients of float32 `inputs` against the definition in float64."""
    single = [x.detach().requires_grad_() for x in inputs]
    double = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*single), definition(*double)
    pull = drawn(*out.shape)
    found = [out, *torch.autograd.grad(out, single, pull)]
    wanted = [expected, *torch.autograd.grad(expected, double, pull.double())]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=tolerance * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("shape", [(700, 128), (3, 40), (33, 4, 32), (1, 7)])
@pytest.mark.usefixtures("threads")
def test_rms_norm(shape: tuple[int, ...]) -> None:
    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    same(lambda x, w: elementwise.rms_norm(x, w, 1e-6), definition, [drawn(*shape), 1 + drawn(shape[-1])])


@pytest.mark.parametrize("size", [32, 40, 6])
@pytest.mark.usefixtures("threads")
def test_rotation(size: int) -> None:
    angle = drawn(300, 1, size // 2)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)

    def definition(x: Tensor) -> Tensor:
        swapped = torch.cat((x[..., size // 2 :], x[..., : size // 2]), -1)
        return x * cos.double() + swapped * sin.double()

    same(lambda x: elementwise.rotate(x, cos, sin), definition, [drawn(300, 8, size)])
    every = drawn(300, 12, size)  # heads of a joint product: rows do not lie one behind the other
    torch.testing.assert_close(elementwise.rotate(every[:, 2:6], cos, sin), definition(every[:, 2:6].double()).float())


@pytest.mark.parametrize("size", [384, 21])
@pytest.mark.usefixtures("threads")
def test_swiglu(size: int) -> None:
    gate = 6 * drawn(200, size)
    gate[0, 0], gate[1, 1], gate[2, 2] = 90.0, -90.0, 0.0
    same(elementwise.swiglu, lambda g, u: F.silu(g) * u, [gate, drawn(200, size)])
    joint = drawn(50, 2 * size)
    torch.testing.assert_close(
        elementwise.swiglu(joint[:, :size], joint[:, size:]), F.silu(joint[:, :size]) * joint[:, size:]
    )


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(16, 2, 1), (32, 4, 4), (64, 9, 3), (96, 4, 2), (128, 5, 1)])
@pytest.mark.usefixtures("threads")
def test_attention_among_the_rows_of_a_tree(size: int, heads: int, kv_heads: int) -> None:
    """Beginnings within beginnings; test_shared_prefixes holds what merges parts to single documents."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(3):
        prompt = random.integers(0, 9, int(random.integers(9, 40)))
        for sample in range(5):
            begin = np.concatenate((prompt, random.integers(0, 9, 10))) if sample == 2 else prompt
            documents += [np.concatenate((begin, random.integers(0, 9, n))).astype(np.int32) for n in (1, 17)]
    tree = make_tree(documents)
    compiled, torchs = CompiledParts.of_tree(tree), TreeParts(tree)
    assert compiled is not None
    inputs = [drawn(tree.num_rows, n, size) for n in (heads, kv_heads, kv_heads)]
    pull, exact = drawn(tree.num_rows, heads, size), [x.double() for x in inputs]
    found, expected = compiled.forward(*inputs), torchs.forward(*exact)
    of_inputs = compiled.backward(pull, [*inputs, *found])
    again = compiled.backward(pull, [*inputs, *found])
    wanted = torchs.backward(pull.double(), [*exact, *expected])
    for a, b in zip([*found, *of_inputs], [*expected, *wanted], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))
    assert all(torch.equal(a, b) for a, b in zip(of_inputs, again, strict=True))


def cache_of(tokens: int, heads: int, kv_heads: int, size: int) -> tuple[KVCache, BlockTables]:
    cache = KVCache(
        layers=1, heads=heads, kv_heads=kv_heads, head_dim=size, max_blocks=64, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    tables = BlockTables(slots=3, blocks=64, size=32)
    for slot in range(3):
        for part in np.split(np.arange(tokens, dtype=np.int32), 2):
            block, place = tables.append(slot, part)
            key, value = drawn(len(part), kv_heads, size) + slot, drawn(len(part) + 1, kv_heads, size)[1:]
            cache.write(0, Places(block, place), key, value)
    return cache, tables


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(16, 3, 1), (32, 4, 4), (64, 9, 3), (128, 10, 2)])
@pytest.mark.usefixtures("threads")
def test_attention_over_the_cache(size: int, heads: int, kv_heads: int, window: int) -> None:
    def attend() -> Tensor:
        cache, tables = cache_of(70, heads, kv_heads, size)
        feed = Feed(slot=np.array([2, 0, 1]), start=np.array([70, 70, 70]), count=np.array([1, 3, 1]))
        block, place = zip(
            *(tables.append(s, np.arange(n, dtype=np.int32)) for s, n in ((2, 1), (0, 3), (1, 1))), strict=True
        )
        where = Places(np.concatenate(block), np.concatenate(place))
        attention = CacheAttention(cache, tables, feed, where, 3, 0)
        joint = drawn(5, heads + 2 * kv_heads, size)
        query, key, value = joint[:, :heads], joint[:, heads : heads + kv_heads], joint[:, heads + kv_heads :]
        return attention(0, query, key, value, window=window)

    found = attend()
    native.library.cache_clear()
    os.environ["ASYNC_RL_NATIVE"] = "0"
    try:
        torch.testing.assert_close(found, attend(), rtol=1e-5, atol=2e-6)
    finally:
        del os.environ["ASYNC_RL_NATIVE"]
        native.library.cache_clear()


def test_what_is_not_finite_reaches_the_result() -> None:
    bad = drawn(4, 64)
    bad[1, 3], bad[2, 5] = torch.nan, torch.inf
    normed = elementwise.rms_norm(bad, torch.ones(64), 1e-6)
    assert normed[1].isnan().all()
    assert normed[2, 5].isnan()
    assert normed[[0, 3]].isfinite().all()
    gated = elementwise.swiglu(bad, torch.ones(4, 64))
    assert gated[1, 3].isnan()
    assert gated[2, 5].isinf()
    assert gated[1, :3].isfinite().all()
    tree = make_tree([np.arange(12, dtype=np.int32), np.arange(1, 9, dtype=np.int32)])
    parts = CompiledParts.of_tree(tree)
    assert parts is not None
    query, key, value = drawn(20, 2, 32), drawn(20, 2, 32), drawn(20, 2, 32)
    key[15] = torch.nan
    out, _ = parts.forward(query, key, value)
    assert out[:15].isfinite().all()
    assert out[15:].isnan().all()


@pytest.mark.usefixtures("without")
def test_it_can_be_turned_off() -> None:
    assert native.library() is None
    assert not native.usable(torch.ones(1))
    same(elementwise.swiglu, lambda g, u: F.silu(g) * u, [drawn(5, 8), drawn(5, 8)])


def test_a_broken_compiler_leaves_torchs_operations(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken && exit 0\nexit 1\n')
    compiler.chmod(0o755)
    words = "from async_rl_kernels import native; assert native.library() is None"
    environment = os.environ | {"CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", words], env=environment, check=True)
    assert not list(tmp_path.glob("async_rl/*.so"))


def test_the_library_is_made_once(tmp_path: Path) -> None:
    words = "from async_rl_kernels import native; print(native.library()._name)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", words]
    found = [subprocess.run(command, env=environment, check=True, capture_output=True).stdout for _ in range(2)]
    (made,) = tmp_path.glob("async_rl/*")
    assert found[0] == found[1] == f"{made}\n".encode()
