"""Adapters that arrive alone, added to this process's own copy of the model: whole weights for any engine.

The copy lies beside the engine's weights, in the dtype of the model's files. The sum is the trainer's, bit
for bit (`model.lora.merged`), so the canary compares checksums as ever: of a base that is not the trainer's,
an adapter that is old, damaged or not added at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from async_rl.weights.shared_memory import WeightsError

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """Where adapters come from."""

    def read(self) -> tuple[int, dict[str, Tensor]]: ...

    def close(self) -> None: ...


class MergingSource:
    """A source of adapters as a source of whole weights."""

    def __init__(self, source: Source, base: Mapping[str, Tensor], scaling: float) -> None:
        """`base`: all weights of the model by name, on the device where sums are made; `scaling`: alpha / rank."""
        self._source = source
        self._base = base
        self._scaling = scaling

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """The source's version, and all weights with its adapters added: float32 where there is one, else the base's
        own. Raises WeightsError when the adapters do not fit the base."""
        version, adapters = self._source.read()
        return version, add_to(self._base, adapters, self._scaling)

    def close(self) -> None:
        self._source.close()


def add_to(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """All weights, `base` left as it is. Raises WeightsError for an adapter that is not whole or fits no weight."""
    from async_rl.model.lora import A, B, merged

    weights = dict(base)
    layers = {name.removesuffix(A).removesuffix(B) for name in adapters}
    for layer in layers:
        a, b, weight = adapters.get(layer + A), adapters.get(layer + B), base.get(f"{layer}.weight")
        if a is None or b is None or weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise WeightsError(
                f"the adapter of {layer} does not fit the model here: is model.path the model the run trains?"
            )
        weights[f"{layer}.weight"] = merged(weight, a.to(weight.device), b.to(weight.device), scaling)
    return weights
