"""That a run went back to an earlier checkpoint, once: `rollback.json`, the one truth of it.

Version numbers go on. The step that raised the alarm is done, its result is given up before anybody has seen it,
and from then on version `at`, one behind that step, is the weights of version `to`. So no number ever means two
sets of weights, and staleness counts on. What the given-up versions have sampled and was not trained yet is refused
by the buffer; what was trained stays in the record. Written before the processes end, so whenever any of them is
killed, the next launch knows where to begin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from async_rl.errors import RunFailed
from async_rl.run_folder import RunFolder, to_disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Times in seconds since the epoch."""

    at: int
    """version that the weights gone back to have from then on; step at - 1 was the last that was given up"""
    to: int
    """version of the checkpoint they come from; 0: the initial model"""
    since: int
    """first sign of the collapse, a step"""
    signal: str
    """which alarm"""
    reason: str
    """in words and numbers"""
    lr_scale: float
    """factor on the learning rate from then on"""
    progress: Mapping[str, Any]
    """what the trainer's loop remembers"""
    time: float

    @property
    def given_up(self) -> int:
        """Steps."""
        return self.at - self.to

    def source(self, version: int, *, there: bool) -> int:
        """Version of the checkpoint from which training goes on at `version`; `there`: it has a checkpoint."""
        return self.to if version == self.at and not there else version

    def story(self) -> dict[str, Any]:
        """For events and summary."""
        return {
            "version": self.at,
            "to": self.to,
            "since": self.since,
            "lr_scale": self.lr_scale,
            "reason": self.reason,
            "text": self.in_words(),
        }

    def in_words(self) -> str:
        begin = f"the checkpoint of version {self.to}" if self.to else "the initial model"
        return (
            f"at step {self.at - 1} to {begin}, {self.given_up} steps given up, learning rate x {self.lr_scale:g}: "
            f"{self.reason}"
        )


def read_rollback(folder: RunFolder) -> Rollback | None:
    """None: the run has not gone back. Raises RunFailed when the file is not one of ours."""
    try:
        values = json.loads(folder.rollback.read_text())
        return Rollback(**{field.name: values[field.name] for field in fields(Rollback)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{folder.rollback} cannot be read ({error}); restore it from a copy of the run") from None


def write_rollback(folder: RunFolder, rollback: Rollback) -> None:
    """On the disk when this returns. Raises RunFailed."""
    partial = folder.rollback.with_name(f".{folder.rollback.name}.partial")
    try:
        partial.write_text(json.dumps(asdict(rollback), indent=1))
        to_disk(partial)
        os.replace(partial, folder.rollback)
        to_disk(folder.path)
    except OSError as error:
        raise RunFailed(
            f"{folder.rollback} cannot be written ({error.strerror}); make room on its disk and resume the run"
        ) from None
