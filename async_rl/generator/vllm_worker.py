"""The part of the vLLM engine that runs inside vLLM's worker processes, beside the model.

vLLM mixes `Weights` into its worker class (`worker_extension_cls`) and calls its methods by name.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import vllm._custom_ops
from safetensors.torch import load_file
from torch import Tensor

from async_rl.generator.vllm_engine import OWNER
from async_rl.weights.canary import fingerprint
from async_rl.weights.ipc import put_together

if not torch.cuda.is_available():
    # On CPU vLLM packs linear layers for oneDNN and frees their weights, which then can neither be loaded in
    # place nor looked at. Without the packing decoding is a fifth slower. This module is imported in every
    # worker before its model is made.
    vllm._custom_ops._supports_onednn = False


def _die_with_owner() -> None:
    """vLLM's processes outlive a killed owner, and keep its GPU: end them, this one and the one above it."""
    owner, above = int(os.environ.get(OWNER, "0")), os.getppid()
    if not owner:
        return
    try:
        watched = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([watched], [], [])
        if above not in (owner, 1):
            os.kill(above, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()


_die_with_owner()


class Weights:
    """Mixed into vLLM's worker."""

    get_model: Callable[[], Any]
    """of vLLM's worker"""
    update_weights: Callable[[dict[str, Any]], None]
    """of vLLM's worker, too"""

    def async_rl_load(self, path: str) -> None:
        """Copy the weights of a safetensors file into the model, in place."""
        self.get_model().load_weights(load_file(path).items())
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def async_rl_update_ipc(self, update: dict[str, Any]) -> None:
        """Tensors of the trainer on this GPU, by handles taken apart (weights/ipc.py), into vLLM's IPC engine."""
        dtypes = [getattr(torch, name) for name in update["dtype_names"]]
        rebuilt = [put_together(plain, dtype) for plain, dtype in zip(update["handles"], dtypes, strict=True)]
        given = {name: update[name] for name in ("names", "dtype_names", "shapes")}
        self.update_weights({**given, "ipc_handles": [{update["gpu"]: arguments} for arguments in rebuilt]})

    def async_rl_fingerprint(self, version: int, wanted: Sequence[tuple[str, Sequence[int]]]) -> dict[str, int]:
        """Checksums of the model's tensors under the trainer's names (`wanted`: name, shape). A tensor that this
        worker does not hold whole (tensor parallel) is left out."""
        model = self.get_model()
        held = _unpacked(dict(model.named_parameters()), getattr(model, "packed_modules_mapping", {}), dict(wanted))
        return fingerprint(held, version)

    def async_rl_pid(self) -> int:
        return os.getpid()


def _unpacked(
    parameters: dict[str, Tensor], packing: dict[str, list[str]], wanted: dict[str, Sequence[int]]
) -> dict[str, Tensor]:
    """vLLM stacks some matrices (query, key and value; gate and up) on top of each other: take them apart."""
    held: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        found = parameters.get(name)
        if found is None:
            found = _part(parameters, packing, wanted, name)
        elif len(shape) and found.shape[0] > shape[0]:
            found = found[: shape[0]]  # the vocabulary is padded
        if found is not None and tuple(found.shape) == tuple(shape):
            held[name] = found
    return held


def _part(
    parameters: dict[str, Tensor], packing: dict[str, list[str]], wanted: dict[str, Sequence[int]], name: str
) -> Tensor | None:
    for packed, parts in packing.items():
        for part in parts:
            if f".{part}." not in name:
                continue
            whole = parameters.get(name.replace(f".{part}.", f".{packed}."))
            sizes = [wanted[name.replace(f".{part}.", f".{p}.")][0] for p in parts]
            if whole is None or whole.shape[0] != sum(sizes):
                return None
            begin = sum(sizes[: parts.index(part)])
            return whole[begin : begin + sizes[parts.index(part)]]
    return None
