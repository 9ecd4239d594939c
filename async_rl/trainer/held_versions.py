"""The weights of the last versions (`HeldVersions`), so that tokens can be scored under the version that sampled them.

The newest is the learner's own. The one before lies in the segment that generators read, which costs nothing. Older
ones, and those of runs without a segment, are copied, as far as they fit into `verify.memory_mb`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner
    from async_rl.trainer.publish import Publisher


@dataclass(slots=True, kw_only=True)
class HeldVersions:
    """The versions that a trajectory may name."""

    learner: Learner
    publisher: Publisher
    most: int
    """versions before the newest that a trajectory may name: staleness.max_staleness"""
    budget_bytes: int
    """of copies"""
    copies: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """version -> trained parameters by name"""

    def keep(self) -> None:
        """Copy what the next publication would overwrite. Call it before each, with the learner at the new version."""
        newest = self.learner.version
        for version in [v for v in self.copies if v < newest - self.most]:
            del self.copies[version]
        if self.most < 1:
            return
        segment = self._segment()
        if segment is None:
            self._copy(newest, dict(self.learner.trained()))
            return
        for version, tensors in segment.items():
            if newest - self.most <= version < newest - 1:
                self._copy(version, tensors)

    def versions(self) -> frozenset[int]:
        """Those that can be put into the model now."""
        older = {*(self._segment() or ()), *self.copies} if self._fits_device() else set()
        return frozenset({self.learner.version, *older})

    @contextmanager
    def weights(self, version: int) -> Iterator[None]:
        """Inside, the learner's model has the weights of one of `versions()`. Nothing may be trained meanwhile."""
        if version == self.learner.version:
            yield
            return
        held = self.copies.get(version)
        if held is None:
            held = dict((self._segment() or {})[version])
        own: dict[str, Tensor] = {}
        parameters = dict(self.learner.model.named_parameters())
        try:
            for name, tensor in held.items():
                parameter = parameters[name]
                own[name] = parameter.data
                parameter.data = tensor.to(device=parameter.device, dtype=parameter.dtype)
            yield
        finally:
            for name, tensor in own.items():
                parameters[name].data = tensor

    def _segment(self) -> Mapping[int, Mapping[str, Tensor]] | None:
        """The versions in the segment; None where there is none, or where it holds other tensors than are trained."""
        if self.learner.adapters is not None:
            return None
        held = getattr(self.publisher, "held", None)
        return None if held is None else held()

    def _copy(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if version not in self.copies and size * (len(self.copies) + 1) <= self.budget_bytes:
            self.copies[version] = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    def _fits_device(self) -> bool:
        """Whether a second set of weights fits where the learner computes: to a GPU it is copied."""
        device = next(self.learner.model.parameters()).device
        return device.type == "cpu" or self.learner.sent_bytes <= self.budget_bytes
