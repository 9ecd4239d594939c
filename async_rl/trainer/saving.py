"""A checkpoint that is finished while training goes on.

The files are written while training stands still, which takes what a copy into the page cache takes. Reading them back,
summing them and waiting for the disk is done by a thread. The checkpoint counts when its sums are on the disk and it
has its name; before, the one before counts, also when the trainer is killed meanwhile. The hash of the weights is taken
from memory, so the optimizer waits for it (`before_write`), and is in the run's record before the checkpoint counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from async_rl.trainer.manifest import Partial
from async_rl.trainer.team import weights_hash

if TYPE_CHECKING:
    from torch import Tensor

LOOK_S = 0.5
"""how often the end of a wait gives a sign of life"""


@dataclass(slots=True, kw_only=True)
class Saving:
    """One checkpoint between its files and its name."""

    partial: Partial
    version: int
    stood_still_s: float
    """training, while the files were written"""
    weights: Sequence[tuple[str, Tensor]]
    """in order of name; their hash is recorded. Empty: it is recorded already"""
    record_hash: Callable[[str], None]
    tidy: Callable[[], None]
    """called when the checkpoint is whole"""
    began: float = field(default_factory=time.monotonic)
    """when the files were written"""
    failure: Exception | None = None
    _hashed: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> Saving:
        """Start the thread."""
        threading.Thread(target=self._work, name=f"checkpoint {self.version}", daemon=True).start()
        return self

    def _work(self) -> None:
        try:
            if self.weights:
                self.record_hash(weights_hash(self.weights))
                self.weights = ()
            self._hashed.set()
            self.partial.finish()
            self.tidy()
        except Exception as error:  # the boundary of this thread: raised in `wait`
            self.failure = error
        self._hashed.set()
        self._done.set()

    def before_write(self) -> None:
        """Wait until the weights may change."""
        self._hashed.wait()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, keepalive: Callable[[], None] = lambda: None) -> None:
        """Return when the checkpoint counts. Raises what its thread raised."""
        while not self._done.wait(LOOK_S):
            keepalive()
        if self.failure is not None:
            raise self.failure
