"""Low-rank adapters on the linear layers of a model (Hu et al. 2021), through peft.

The weight W is frozen, and B A x alpha / rank is added to its output. A is random and B zero at first, so a model with
fresh adapters computes what it did before. There is no dropout: it would make log-probs, and so every ratio, random.

The sum W + B A alpha / rank is defined element by element in a fixed order (`merged`), so that trainer and generators
get the same bits from the same tensors on any device, and checksums show a generator whose weights are not the
trainer's.

Shapes: W [out, in], A [rank, in], B [out, rank].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from async_rl.errors import UserError
from async_rl.model.architecture import check_targets, plain_name

if TYPE_CHECKING:
    from async_rl.model.decoder import Attention, Decoder
    from async_rl.model.huggingface import HuggingFaceDecoder

NAME = "default"
"""name of the adapter in peft, which can hold several"""
A, B = ".lora_A.weight", ".lora_B.weight"
WEIGHTS_FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
"""peft's file name, and the prefix of names in a `PeftModel` around a transformers model"""
BLOCK = 1 << 16
"""elements of one tensor that are added at a time: they stay in a processor's cache"""


class Adapters:
    """The adapters in a model. All other parameters of the model are frozen."""

    def __init__(self, model: Decoder | HuggingFaceDecoder, config: Any, layers: Mapping[str, Any]) -> None:
        """Use `add_adapters`. `config`: peft's; `layers`: peft's layers by the name of the layer they replace."""
        self._model = model
        self._config = config
        self._layers = layers
        self.scaling: float = config.lora_alpha / config.r

    def tensors(self) -> dict[str, Tensor]:
        """A [rank, in] and B [out, rank] of every layer, `<layer>.lora_A.weight` and `.lora_B.weight`, detached."""
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors as from `tensors` into the adapters. Raises KeyError for a missing one."""
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[name])

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the whole model with the adapters added, in order of name. Each tensor is computed when it
        is requested."""
        for name, parameter in sorted(self._model.named_parameters(), key=lambda pair: plain_name(pair[0])):
            layer, _, rest = name.partition(".base_layer.")
            if rest == "weight":
                a, b = self._layers[layer].lora_A[NAME].weight, self._layers[layer].lora_B[NAME].weight
                yield f"{layer}.weight", merged(parameter.detach(), a.detach(), b.detach(), self.scaling)
            elif not parameter.requires_grad:
                yield plain_name(name), parameter.detach()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model computes as before training. Not for a forward that will be differentiated."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def save(self, folder: Path, *, base: str) -> None:
        """Write a folder that peft loads onto the model in the folder `base`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        self._config.base_model_name_or_path = base
        self._config.save_pretrained(str(folder))
        whole = {PREFIX + name: t.cpu().contiguous().clone() for name, t in self.tensors().items()}
        save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def _parameters(self) -> dict[str, nn.Parameter]:
        found = {}
        for name, layer in self._layers.items():
            found[name + A] = layer.lora_A[NAME].weight
            found[name + B] = layer.lora_B[NAME].weight
        return found


class WithoutAdapters:
    """The model before training, without a copy of it: calls the model with its adapters off."""

    def __init__(self, model: Decoder | HuggingFaceDecoder, adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters

    @property
    def head(self) -> Tensor:  # [vocabulary, hidden]
        return self._model.head

    @property
    def logit_cap(self) -> float:
        return self._model.logit_cap

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """As `Decoder.forward`."""
        with self._adapters.off():
            hidden: Tensor = self._model(tokens, positions, attention, rows)
        return hidden


def add_adapters(
    model: Decoder | HuggingFaceDecoder, *, rank: int, alpha: float, targets: Sequence[str] = ()
) -> Adapters:
    """Add fresh adapters (A drawn with torch's random state) to the layers whose names end in one of `targets` (empty:
    all linear layers but the head), and freeze the rest. Raises UserError when peft is missing or a target is no
    linear layer."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora.rank needs peft; pip install peft transformers, or set lora.rank=0") from None
    known = linear_names(model)
    if not known:
        raise UserError(f"lora.rank: a model of type {model.config.family!r} has no plain linear layer to adapt")
    check_targets(targets, known)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft accepts a float
        target_modules=sorted(targets or known),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model, NAME)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for layer in layers.values():
        layer.cast_input_dtype_enabled = False  # autocast casts, without a copy in float32
    return Adapters(model, config, layers)


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """The tensors that `Adapters.save` wrote, for `Adapters.load`. Raises FileNotFoundError."""
    from safetensors.torch import load_file

    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the head."""
    head = model.head
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not head
    }
    return sorted(found)


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """weight + scaling * b @ a, [out, in] in float32 (float64 for weights in it), in new memory.

    weight [out, in], a [rank, in], b [out, rank]. Every operation rounds each element once, in the order of the rank,
    so the bits are the same on every device and for any number of threads, which a matrix product does not promise. It
    costs 2 * rank passes over the tensor.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = (b.to(dtype) * scaling).contiguous(), a.to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # one block on a GPU, where launches are expensive and caches do not matter
    rows = len(out) if weight.is_cuda else max(1, BLOCK // max(1, weight.shape[1]))
    for begin in range(0, len(out), rows):
        part, factor = out[begin : begin + rows], left[begin : begin + rows]
        torch.mul(factor[:, :1], right[:1], out=part)
        product = torch.empty_like(part)
        for k in range(1, right.shape[0]):
            part.add_(torch.mul(factor[:, k : k + 1], right[k : k + 1], out=product))
        part.add_(weight[begin : begin + rows].to(dtype))
    return out
