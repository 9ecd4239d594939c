"""Every way of attending among packed documents gives the definition's numbers and gradients.

The CUDA kernels cannot run on a CPU: here functions with their published signatures stand in, which compute
by the definition and refuse every other calling convention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_models import make_decoder, qwen3_config
from support_run import quick_settings
from torch import Tensor

from async_rl.errors import UserError
from async_rl.model.attention import DocumentAttention
from async_rl.model.prefix_tree import PrefixTree, make_tree
from async_rl.model.tree_attention import TreeAttention
from async_rl.model.varlen import Kernel, choose_backend, flash_kernel, make_kernel, torch_kernel, usable_backend
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import pack_batch
from async_rl.trajectory import Trajectory, Turn, VersionSpan

HEADS, KV_HEADS, SIZE = 4, 2, 8


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, window: int = 0, cap: float = 0.0,
    keys: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(size)) v over the tokens of the own document up to the own one, or the last `window` of
    them, token by token; with a cap scores s are cap * tanh(s / cap). keys: those of each document, where it has more
    than queries: the last of them belong to the queries."""
    share = query.shape[1] // key.shape[1]
    begin, row, rows = 0, 0, []
    for length, known in zip(lengths, keys or lengths, strict=True):
        for i in range(known - length, known):
            heads = []
            for head in range(query.shape[1]):
                seen = slice(begin + (max(0, i + 1 - window) if window else 0), begin + i + 1)
                scores = key[seen, head // share] @ query[row, head] / query.shape[2] ** 0.5
                weights = torch.softmax(cap * torch.tanh(scores / cap) if cap else scores, 0)
                heads.append(weights @ value[seen, head // share])
            rows.append(torch.stack(heads))
            row += 1
        begin += known
    return torch.stack(rows)


def checked(
    query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[Tensor], longest: Sequence[int], sizes: tuple[int, int],
    *, same_heads: bool,
) -> Tensor:  # fmt: skip
    """What a kernel gives, after everything it demands of its arguments. sizes: tokens before and behind the own one
    that are seen; -1: all."""
    lengths, keys = (b.diff().tolist() for b in bounds)
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert all(b.dtype == torch.int32 and b.dim() == 1 and b.is_contiguous() and int(b[0]) == 0 for b in bounds)
    assert all(type(n) is int and n == max(of) for n, of in zip(longest, (lengths, keys), strict=True))
    assert query.dim() == 3
    assert (query.shape[0], key.shape[0]) == (sum(lengths), sum(keys))
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert not same_heads or query.shape[1] == key.shape[1]
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    left, right = sizes
    assert right in (0, -1)  # with `causal` both are the same
    exact = by_definition(query.double(), key.double(), value.double(), lengths, window=left + 1, keys=keys)
    return exact.to(query.dtype)


# Signatures as published; names and order are theirs. flash-attn 2.8.3, 3 (hopper/), torch 2.11 and 2.13.
def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal
    assert (dropout_p, softmax_scale, softcap) == (0.0, None, 0.0)
    return checked(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), window_size, same_heads=False)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert causal
    assert (seqused_q, seqused_k, softmax_scale, softcap) == (None, None, None, 0.0)
    return checked(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), window_size, same_heads=False)


def flash_3_early(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Returned the log-sum-exp with it."""
    return flash_3(*arguments, **named), torch.zeros(1)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert (return_aux, scale, window_size[1]) == (None, None, 0)
    return checked(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), window_size, same_heads=True)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert (return_aux, scale, window_size[1], seqused_k, block_table) == (None, None, 0, None, None)
    return checked(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), window_size, same_heads=not enable_gqa)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "flash-attn 2": lambda: flash_kernel(flash_2),
    "flash-attn 3": lambda: flash_kernel(flash_3),
    "flash-attn 3, early": lambda: flash_kernel(flash_3_early),
    "torch 2.11": lambda: torch_kernel(torch_2_11),
    "torch 2.13": lambda: torch_kernel(torch_2_13),
}


def tensors(lengths: Sequence[int], dtype: torch.dtype, *, kv_heads: int = KV_HEADS) -> list[Tensor]:
    random = torch.Generator().manual_seed(len(lengths))
    shapes = [(sum(lengths), heads, SIZE) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def compare(
    attention: DocumentAttention, lengths: Sequence[int], dtype: torch.dtype, bound: float, *, kv_heads: int = KV_HEADS,
    **rule: Any,
) -> None:  # fmt: skip
    """Values and gradients against the definition in float64. rule: window, cap."""
    given_ = tensors(lengths, dtype, kv_heads=kv_heads)
    exact = [t.detach().double().requires_grad_() for t in given_]
    weight = torch.randn(sum(lengths), HEADS, SIZE, generator=torch.Generator().manual_seed(9)).double()
    found, expected = attention(0, *given_, **rule), by_definition(*exact, lengths, **rule)
    assert found.dtype == dtype
    gradients = torch.autograd.grad((found.double() * weight).sum(), given_)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for got, want in zip((found, *gradients), (expected, *wanted), strict=True):
        assert difference(got, want) <= bound


def difference(got: Tensor, want: Tensor) -> float:
    """The largest, as a share of the largest element where that is above 1."""
    return float((got.double() - want).detach().abs().max()) / max(1.0, float(want.detach().abs().max()))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_padded_sdpa_equals_the_definition(lengths: list[int]) -> None:
    compare(DocumentAttention(lengths), lengths, torch.float64, 1e-12)
    compare(DocumentAttention(lengths), lengths, torch.float32, 1e-5)
    compare(DocumentAttention(lengths), lengths, torch.bfloat16, 3e-2)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10), st.sampled_from([0.0, 0.7]))
def test_windows_and_capped_scores_equal_the_definition(lengths: list[int], window: int, cap: float) -> None:
    rule = {"window": window, "cap": cap}
    compare(DocumentAttention(lengths), lengths, torch.float64, 1e-6 if cap else 1e-12, **rule)
    compare(DocumentAttention(lengths), lengths, torch.float32, 1e-5, **rule)
    # scores are capped in torch operations, whatever kernel is there
    kernel = flash_kernel(flash_2)
    compare(DocumentAttention(lengths, kernel), lengths, torch.bfloat16, 4e-2, **rule)


@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 3], [7]], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_called_as_it_is_published_and_gives_the_definition(
    name: str, lengths: list[int], kv_heads: int, window: int
) -> None:
    attention = DocumentAttention(lengths, KERNELS[name]())
    compare(attention, lengths, torch.bfloat16, 3e-2, kv_heads=kv_heads, window=window)


def test_full_precision_does_not_reach_a_kernel_that_cannot_take_it() -> None:
    lengths = [4, 2]
    compare(DocumentAttention(lengths, KERNELS["flash-attn 2"]()), lengths, torch.float32, 1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_packed_batch_under_autocast_goes_through_the_kernel_in_bfloat16(name: str) -> None:
    calls = []
    kernel = KERNELS[name]()

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[0].dtype)
        return kernel(*arguments)

    model = make_decoder(qwen3_config(), std=0.1)
    trajectories = [
        Trajectory(
            group=0, sample=i, problem=0, split="train", seed=0,
            tokens=torch.arange(length).numpy().astype("int32"), log_behaviour=torch.zeros(length).numpy(),
            turns=(Turn(start=1, length=length - 1),), versions=(VersionSpan(version=0, start=1, end=length),),
            reward=0.0, ended="finished",
        )
        for i, length in enumerate((6, 3))
    ]  # fmt: skip
    micro = pack_batch(trajectories, micro_batch_tokens=100).micro_batches[0]
    found = log_probs(model, micro, ModelArithmetic(temperature=1.0, dtype=torch.bfloat16, kernel=counted))
    plain = log_probs(model, micro, ModelArithmetic(temperature=1.0))
    assert calls == [torch.bfloat16] * model.config.layers
    assert found.log_prob.dtype == torch.float32
    assert torch.allclose(found.log_prob, plain.log_prob, atol=0.1)
    found.log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_torchs_own_kernel_has_the_signature_that_is_called() -> None:
    from torch.nn.attention.varlen import varlen_attn

    parameters = list(inspect.signature(varlen_attn).parameters.values())
    assert [p.name for p in parameters[:7]] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:7])
    assert {"window_size", "scale"} <= {p.name for p in parameters[7:]}
    assert make_kernel("torch varlen") is not None
    assert make_kernel("sdpa") is None


def test_the_back_end_follows_what_is_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", device="cpu", half=True) == "sdpa"
    assert choose_backend("auto", device="cuda", half=False) == "sdpa"
    assert choose_backend("sdpa", device="cuda", half=True) == "sdpa"
    assert choose_backend("auto", device="cuda", half=True) == "torch varlen"
    assert choose_backend("varlen", device="cuda:1", half=True) == "torch varlen"
    with pytest.raises(UserError, match="pip install flash-attn"):
        choose_backend("flash", device="cuda", half=True)
    (tmp_path / "flash_attn.py").write_text("from a_torch_that_is_not_here import kernels\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_backend("auto", device="cuda", half=True) == "flash-attn 2"
    assert choose_backend("flash", device="cuda", half=True) == "flash-attn 2"
    assert choose_backend("varlen", device="cuda", half=True) == "torch varlen"
    with pytest.raises(UserError, match=r"flash-attn 2 .* cannot be imported: .*trainer\.attention=sdpa"):
        make_kernel("flash-attn 2")
    assert usable_backend("auto", device="cuda", half=True) == "torch varlen"  # the trainer goes on without it
    assert usable_backend("flash", device="cuda", half=True) == "flash-attn 2"  # and says so where it was asked for
    sys.modules.pop("flash_attn", None)


def test_flash_attn_4_is_not_taken_for_flash_attn_2(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It installs flash_attn/cute and no flash_attn/__init__.py, so that flash_attn can be found and holds nothing."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_backend("auto", device="cuda", half=True) == "torch varlen"
    with pytest.raises(UserError, match="flash-attn is not installed"):
        choose_backend("flash", device="cuda", half=True)


@pytest.mark.parametrize("asked", ["flash", "varlen"])
def test_a_kernel_for_gpus_is_refused_on_a_cpu_and_in_full_precision(asked: str, tiny_model: Any) -> None:
    from async_rl.run.preflight import preflight

    with pytest.raises(UserError, match=rf"trainer\.attention is {asked}.*trainer\.dtype=bfloat16"):
        preflight(quick_settings(tiny_model, f"trainer.attention={asked}"))


def tree_of(seed: int) -> PrefixTree:
    """Documents with nested common beginnings, one within another, and one for itself."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 2, int(random.integers(1, 9))).astype(np.int32) for _ in range(7)]
    head = random.integers(0, 2, 6).astype(np.int32)
    return make_tree([*(np.concatenate([head, d]) for d in documents), head, documents[0]], shortest=1 + seed % 3)


def compare_tree(tree: PrefixTree, kernel: Kernel | None, dtype: torch.dtype, bound: float, **rule: Any) -> None:
    """A tree's attention and gradients are those of its documents one by one."""
    inputs = tensors([tree.num_rows], dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rows = torch.from_numpy(tree.row_of_token)
    found = TreeAttention(tree, kernel)(0, *inputs, **rule)[rows]
    want = by_definition(*(tensor[rows] for tensor in exact), tree.documents, **rule)
    assert found.dtype == dtype
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = zip(
        (found, *torch.autograd.grad((found.double() * weights).sum(), inputs)),
        (want, *torch.autograd.grad((want * weights).sum(), exact)),
        strict=True,
    )
    for got, wanted in pairs:
        assert difference(got, wanted) <= bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", [{}, {"window": 3}, {"window": 100}, {"cap": 2.0}, {"window": 2, "cap": 2.0}], ids=str)
def test_rows_of_a_tree_attend_as_its_documents_do(seed: int, rule: dict[str, Any]) -> None:
    tree = tree_of(seed)
    assert tree.num_rows < sum(tree.documents)
    compare_tree(tree, None, torch.float64, 1e-6 if "cap" in rule else 1e-12, **rule)
    compare_tree(tree, None, torch.float32, 1e-5, **rule)
    compare_tree(tree, None, torch.bfloat16, 6e-2, **rule)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [0, 3])
def test_kernels_take_the_runs_of_a_tree_with_all_keys_before_them(name: str, window: int) -> None:
    compare_tree(tree_of(1), KERNELS[name](), torch.bfloat16, 6e-2, window=window)


def test_a_tree_refuses_other_rows_than_its_own() -> None:
    tree = tree_of(0)
    with pytest.raises(ValueError, match=f"for a tree of {tree.num_rows} rows"):
        TreeAttention(tree)(0, *tensors([tree.num_rows + 1], torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("lengths", [[5, 130, 64, 1], [33]], ids=str)
def test_the_kernels_that_are_installed_equal_the_definition_on_a_gpu(lengths: list[int], window: int) -> None:
    random = torch.Generator().manual_seed(0)
    for asked in ("varlen", "auto"):
        kernel = make_kernel(choose_backend(asked, device="cuda", half=True))
        shapes = [(sum(lengths), heads, 64) for heads in (4, 2, 2)]
        half = [torch.randn(s, generator=random).bfloat16().cuda().requires_grad_() for s in shapes]
        exact = [t.detach().cpu().double().requires_grad_() for t in half]
        found = DocumentAttention(lengths, kernel)(0, *half, window=window)
        expected = DocumentAttention(lengths)(0, *exact, window=window)
        gradients = torch.autograd.grad(found.float().square().sum(), half)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        for got, want in zip((found, *gradients), (expected, *wanted), strict=True):
            assert difference(got.cpu(), want) <= 4e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [0, 3])
def test_the_kernels_that_are_installed_take_trees_on_a_gpu(window: int) -> None:
    tree, random = tree_of(1), torch.Generator().manual_seed(0)
    for asked in ("varlen", "auto", "sdpa"):
        kernel = make_kernel(choose_backend(asked, device="cuda", half=True))
        shapes = [(tree.num_rows, heads, 64) for heads in (4, 2, 2)]
        half = [torch.randn(s, generator=random).bfloat16().cuda().requires_grad_() for s in shapes]
        exact = [t.detach().cpu().double().requires_grad_() for t in half]
        found = TreeAttention(tree, kernel)(0, *half, window=window)
        expected = TreeAttention(tree)(0, *exact, window=window)
        gradients = torch.autograd.grad(found.float().square().sum(), half)
        wanted = torch.autograd.grad(expected.square().sum(), exact)
        for got, want in zip((found, *gradients), (expected, *wanted), strict=True):
            assert difference(got.cpu(), want) <= 4e-2
