"""CUDA kernels for attention among packed documents of unequal lengths, and the choice among them.

All compute in half precision (bfloat16, float16) and take [tokens, heads, head_dim], int32 bounds and the length of the
longest document. Tests call them through functions that have the published signatures and compute by the definition,
because the machine that runs the tests has no GPU. Without a kernel `attention.DocumentAttention` pads documents of
similar length and uses SDPA.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from async_rl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Made = TypeVar("Made")
Asked = Literal["auto", "flash", "varlen", "sdpa"]
Backend = Literal["flash-attn 3", "flash-attn 2", "torch varlen", "sdpa"]
Pair = tuple[Made, Made]
"""of queries, and of keys and values"""
Kernel = Callable[["Tensor", "Tensor", "Tensor", Pair["Tensor"], Pair[int], int], "Tensor"]
"""query [queries, heads, head_dim], key and value [keys, kv_heads, head_dim], bounds [documents + 1] int32, rows of the
longest document, tokens that one attends to (itself among them; 0: all before it)
-> [queries, heads, head_dim]; causal, scaled by 1 / sqrt(head_dim)

A document may have more keys than queries: its queries are then the last of its tokens."""

MODULES = {
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
    "torch varlen": "torch.nn.attention.varlen",
}
HOPPER = 9
"""major compute capability of the GPUs that flash-attn 3 is for"""


def choose_backend(asked: Asked, *, device: str, half: bool) -> Backend:
    """The kernel for a trainer on `device`; `half`: it computes in bfloat16. Raises UserError with the remedy."""
    able = device != "cpu" and half
    if asked in ("flash", "varlen") and not able:
        raise UserError(
            f"trainer.attention is {asked}, a kernel for GPUs and half precision; set trainer.device=cuda and "
            "trainer.dtype=bfloat16, or trainer.attention=auto"
        )
    if asked == "sdpa" or not able:
        return "sdpa"
    flash = _installed_flash(device)
    if flash is not None and asked != "varlen":
        return flash
    if asked == "flash":
        raise UserError(
            "trainer.attention is flash, but flash-attn is not installed; pip install flash-attn --no-build-isolation, "
            "or set trainer.attention=auto (torch's own kernel)"
        )
    return "torch varlen"


def usable_backend(asked: Asked, *, device: str, half: bool) -> Backend:
    """`choose_backend`, with the next kernel where `auto` chose one whose package cannot be imported (built for another
    torch, say). Imports torch, as the process that trains may. Raises UserError."""
    found = choose_backend(asked, device=device, half=half)
    if asked != "auto" or found == "sdpa":
        return found
    kinds: tuple[Backend, ...] = ("flash-attn 3", "flash-attn 2", "torch varlen")
    for backend in kinds[kinds.index(found) :]:
        if backend == "flash-attn 2" and not _is_there("flash-attn 2"):
            continue
        try:
            make_kernel(backend)
        except UserError:
            continue
        return backend
    return "sdpa"


def make_kernel(backend: Backend) -> Kernel | None:
    """The kernel of a back end; None for SDPA. Raises UserError when its package cannot be imported."""
    if backend == "sdpa":
        return None
    try:
        if backend == "flash-attn 3":
            from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]
        elif backend == "flash-attn 2":
            from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
        else:
            from torch.nn.attention.varlen import varlen_attn

            return torch_kernel(varlen_attn)
    except ImportError as error:  # built for another torch, say
        raise UserError(
            f"{backend} ({MODULES[backend]}) cannot be imported: {error}; install it again, or set "
            "trainer.attention=sdpa"
        ) from None
    return flash_kernel(flash_attn_varlen_func)


def flash_kernel(function: Callable[..., Any]) -> Kernel:
    """`flash_attn_varlen_func` of flash-attn 2 or 3, which shares key-value heads as the decoder does."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Pair[Tensor], longest: Pair[int], window: int
    ) -> Tensor:
        extra = {"window_size": (window - 1, 0)} if window else {}
        out = function(query, key, value, *bounds, *longest, causal=True, **extra)
        found: Tensor = out[0] if isinstance(out, tuple) else out  # early versions of 3 add the log-sum-exp
        return found

    return attend


def torch_kernel(function: Callable[..., Any]) -> Kernel:
    """`torch.nn.attention.varlen.varlen_attn`. torch 2.11 has no `enable_gqa`: there the heads are repeated."""
    shares_heads = "enable_gqa" in inspect.signature(function).parameters

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Pair[Tensor], longest: Pair[int], window: int
    ) -> Tensor:
        extra: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if shares_heads:
                extra["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        sizes = (window - 1 if window else -1, 0)
        found: Tensor = function(query, key, value, *bounds, *longest, window_size=sizes, **extra)
        return found

    return attend


def _installed_flash(device: str) -> Backend | None:
    if _is_there("flash-attn 3"):
        import torch

        if torch.cuda.get_device_capability(device)[0] == HOPPER:
            return "flash-attn 3"
    return "flash-attn 2" if _is_there("flash-attn 2") else None


def _is_there(backend: Backend) -> bool:
    """Without an import, which the launcher must not make. flash-attn 4 brings a folder flash_attn without a module of
    its own, and so without an origin."""
    found = find_spec(MODULES[backend])
    return found is not None and found.origin is not None
