"""The weights of the last versions (`HeldVersions`), so that tokens can be scored under the version that sampled them.

The newest is the learner's own. The one before lies in the segment that generators read, which costs nothing. Older
ones, and those of runs without a segment, are copied, as far as they fit into `verify.memory_mb`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from async_rl.trainer.ranks import free, local
from async_rl.trainer.rescoring import Scored, Wanted, score
from async_rl.trainer.team import Hold, Rescore, Team

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner
    from async_rl.trainer.publication import Publication
    from async_rl.trainer.publish import Publisher


@dataclass(slots=True, kw_only=True)
class HeldShards:
    """This rank's part of the last versions of a sharded model. Who leads is `HeldOverRanks`."""

    learner: Learner
    copies: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """version -> this rank's part of the trained parameters by name"""

    def hold(self, versions: Collection[int]) -> None:
        """Keep these of the versions before, and copy the present one if it is among them."""
        for version in [v for v in self.copies if v not in versions]:
            del self.copies[version]
        if (newest := self.learner.version) in versions and newest not in self.copies:
            parts = {name: local(tensor) for name, tensor in self.learner.trained().items()}
            self.copies[newest] = {name: part.detach().to("cpu", copy=True) for name, part in parts.items()}

    @property
    def bytes(self) -> int:
        """Of one version."""
        return sum(p.numel() * p.element_size() for p in map(local, self.learner.trained().values()))

    @contextmanager
    def weights(self, version: int) -> Iterator[None]:
        """Inside, this rank's part of the model is that of `version`, which is the present one or is held."""
        if version == self.learner.version:
            yield
            return
        held = self.copies[version]
        own = {name: local(tensor) for name, tensor in self.learner.trained().items() if name in held}
        before = {name: part.detach().clone() for name, part in own.items()}
        try:
            _write(own, held)
            yield
        finally:
            _write(own, before)

    def score(self, version: int, wanted: Sequence[Wanted], *, most_tokens: int) -> list[Scored]:
        """`rescoring.score` under a held version. Collective: every rank scores the same tokens."""
        model, arithmetic = self.learner.model, self.learner.options.arithmetic
        with self.weights(version), arithmetic.autocast(model.head.device):
            found = score(model, wanted, most_tokens=most_tokens)
            free(model)
        return found


@torch.no_grad()
def _write(parts: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        part.copy_(values[name])


@dataclass(slots=True, kw_only=True)
class HeldOverRanks:
    """The leader's side: what `HeldVersions` does, for a model that is sharded over ranks."""

    learner: Learner
    team: Team
    most: int
    """versions before the newest that a trajectory may name: staleness.max_staleness"""
    budget_bytes: int
    """of the copies of one rank"""
    shards: HeldShards = field(init=False)

    def __post_init__(self) -> None:
        self.shards = HeldShards(learner=self.learner)

    def keep(self) -> None:
        """Copy the present version, before the next is published."""
        newest, room = self.learner.version, self.budget_bytes // max(1, self.shards.bytes)
        wanted = [v for v in (*self.shards.copies, newest) if newest - self.most <= v]
        kept = sorted(set(wanted))[-room:] if room and self.most else []
        self.team.send(Hold(versions=tuple(kept)))
        self.shards.hold(kept)

    def versions(self) -> frozenset[int]:
        """Those that can be scored under now."""
        return frozenset({self.learner.version, *self.shards.copies})

    def score(self, version: int, wanted: Sequence[Wanted], *, most_tokens: int) -> list[Scored]:
        """`rescoring.score` under one of `versions()`. Nothing may be trained meanwhile."""
        self.team.send(Rescore(version=version, most_tokens=most_tokens, wanted=wanted))
        return self.shards.score(version, wanted, most_tokens=most_tokens)


@dataclass(slots=True, kw_only=True)
class HeldVersions:
    """The versions that a trajectory may name."""

    learner: Learner
    publisher: Publisher | Publication
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

    def score(self, version: int, wanted: Sequence[Wanted], *, most_tokens: int) -> list[Scored]:
        """`rescoring.score` under one of `versions()`. Nothing may be trained meanwhile."""
        with self.weights(version):
            return score(self.learner.model, wanted, most_tokens=most_tokens)

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
