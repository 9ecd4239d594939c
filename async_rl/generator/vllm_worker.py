"""The part of the vLLM engine that runs inside vLLM's worker processes, with the model.

vLLM mixes `Weights` into its worker class (`worker_extension_cls`) and calls its methods by name.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops
from safetensors.torch import load_file

from async_rl.generator.vllm_engine import OWNER
from async_rl.generator.vllm_layout import find_blocks
from async_rl.weights.blocks import Block, Shown, show
from async_rl.weights.communicator import Meeting
from async_rl.weights.receiver import Receiver
from async_rl.weights.shared_memory import WeightReader
from async_rl.weights.vllm_links import rebuild_arguments

WHOLE = (torch.float32, torch.bfloat16, torch.float16)
"""dtypes of parameters that hold what the trainer sent"""

if not torch.cuda.is_available():
    # On CPU vLLM packs linear layers for oneDNN and frees their weights, which then can neither be loaded in
    # place nor read. Without the packing decoding is a fifth slower. Every worker imports this module before it
    # makes its model.
    vllm._custom_ops._supports_onednn = False


def _die_with_owner() -> None:
    """End this process and its parent when the owner dies: vLLM's processes outlive a killed owner and keep its GPU."""
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
    rank: int
    """of this worker among those that the model is split over, likewise"""

    reload_weights: Callable[..., None]
    """likewise: layer by layer, each quantized anew"""
    model_config: Any
    """likewise"""
    _given: dict[str, Shown] | None = None
    """of a quantized model: what the newest file had at the sampled places, in the place of what is held"""
    _given_version: int = -1
    _shared: WeightReader | None = None
    """its pages stay mapped"""
    _receiver: Receiver | None = None
    """its end of a broadcast"""

    def async_rl_load(self, path: str, version: int) -> None:
        """Copy the weights of a safetensors file into the model, in place. A quantized model is made anew from them."""
        self._take(load_file(path), version)

    def async_rl_load_shared(self, path: str, version: int) -> bool:
        """The same out of the trainer's shared memory, without a copy in between. False when that does not hold this
        version whole any more; parameters may be of several versions then."""
        reader = self._shared
        if reader is None or str(reader.path) != path:
            reader = self._shared = WeightReader(Path(path))
        keep = self.model_config.quantization is not None  # it is made of them layer by layer, perhaps later
        return reader.lend(version, lambda given: self._take({n: t.clone() if keep else t for n, t in given}, version))

    def _take(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        if self.model_config.quantization is None:
            self.get_model().load_weights(tensors.items())
        else:
            whole = {n: Block(tensor=t, shape=tuple(t.shape), start=(0,) * t.dim()) for n, t in tensors.items()}
            self._given, self._given_version = show(whole, version), version
            self.reload_weights(weights_iterator=iter(tensors.items()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def async_rl_join(self, detail: dict[str, int]) -> bool:
        """Join the group over which the trainer sends weights to several engines at once. False when it did not come
        about. `detail`: a `Meeting`, with the rank of this engine's first worker."""
        if self._receiver is None:
            self._receiver = Receiver(next(self.get_model().parameters()).device)
        return self._receiver.join(Meeting(**{**detail, "rank": detail["rank"] + self.rank}))

    def async_rl_receive(self, update: dict[str, Any]) -> bool:
        """Receive a version in that group, into the model's parameters. False when the group ended on the way."""
        assert self._receiver is not None, "the trainer's call to join comes first"
        sent = [(name, dtype, list(shape)) for name, dtype, shape in update["broadcast"]]
        whole = self._receiver.receive(sent, self.get_model().load_weights, packed_bytes=update["packed_bytes"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return whole

    def async_rl_update_ipc(self, update: dict[str, Any]) -> None:
        """Load tensors that the trainer holds on this GPU, by handles that are plain numbers and bytes
        (weights/vllm_links.py), through vLLM's IPC engine."""
        dtypes = [getattr(torch, name) for name in update["dtype_names"]]
        rebuilt = [rebuild_arguments(plain, dtype) for plain, dtype in zip(update["handles"], dtypes, strict=True)]
        given = {name: update[name] for name in ("names", "dtype_names", "shapes")}
        self.update_weights({**given, "ipc_handles": [{update["gpu"]: arguments} for arguments in rebuilt]})

    def async_rl_show(
        self, version: int, wanted: Sequence[tuple[str, Sequence[int]]], workers: int
    ) -> dict[str, Shown | None]:
        """Sampled elements of the model's tensors under the trainer's names (`wanted`: name, shape), as far as this one
        of `workers` holds them. None: it holds a part and cannot say which, or holds it quantized. Of the latter what
        it was made from is shown, where a file was loaded."""
        model = self.get_model()
        vocabulary = {
            f"{name}.weight": (rows.org_vocab_start_index, rows.org_vocab_end_index)
            for name, module in model.named_modules()
            if (rows := getattr(module, "shard_indices", None)) is not None
        }
        parameters = dict(model.named_parameters())
        quantized = self.model_config.quantization is not None
        if quantized:
            parameters = {name: p for name, p in parameters.items() if p.dtype in WHOLE}
        blocks, unclear = find_blocks(
            parameters, getattr(model, "packed_modules_mapping", {}), dict(wanted),
            rank=self.rank, workers=workers, vocabulary=vocabulary,
        )  # fmt: skip
        if quantized:
            unclear += [name for name, _ in wanted if name not in blocks]
        given = self._given or {}
        made_from = {name: given[name] for name in unclear if name in given and version == self._given_version}
        return {**dict.fromkeys(unclear), **made_from, **show(blocks, version)}
