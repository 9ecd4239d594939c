"""Trains along the weights of a run, version by version, as the run trained them; also over its rollback."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from async_rl.run_folder import Rollback, RunFolder, read_rollback
from async_rl.trainer.checkpoint import load_checkpoint, save_checkpoint
from async_rl.trainer.learner import Learner
from async_rl.trainer.manifest import checkpoint_path
from async_rl.trainer.packing import PackedBatch


@dataclass(slots=True)
class Retraining:
    """Trains a learner along the versions of a run. Use it in a `with`: the state that the run goes back to is kept
    on disk meanwhile."""

    learner: Learner
    """at a version of the run: its initial model, or one of its checkpoints"""
    source: Path
    """folder of the initial model"""
    back: Rollback | None
    kept: tempfile.TemporaryDirectory[str] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = tempfile.TemporaryDirectory(prefix="async_rl_retraining_")
        if self.back is not None and self.learner.version >= self.back.at:
            self._go_back(self.back)

    @classmethod
    def of(cls, folder: RunFolder, learner: Learner) -> Self:
        return cls(learner, Path(folder.settings().model.path), read_rollback(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.cleanup()

    def step(self, packed: PackedBatch) -> None:
        """Train on the batch of the next step. Where the run went back, the step's result is given up."""
        learner, back = self.learner, self.back
        if back is not None and learner.version == back.to:
            save_checkpoint(Path(self.kept.name), learner, {}, source=self.source, keep=1)
        if back is None or learner.version + 1 != back.at:
            learner.step(packed)
            return
        load_checkpoint(checkpoint_path(Path(self.kept.name), back.to), learner)
        learner.version = back.at
        self._go_back(back)

    def _go_back(self, back: Rollback) -> None:
        self.learner.given_up, self.learner.rate_scale = back.given_up, back.lr_scale
