"""One version of the weights, held still while it is sent: a copy in the generators' dtype, on the trainer's device
or, where only what is under way must be on it, in main memory (pinned).

Who blocks whom: any number of transfers read at once; the trainer waits for them before it writes the next
version, by a deadline, and names who holds it up. The copy costs the model's size once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from async_rl.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor


LOOK_S = 1.0
"""between two calls of what a writer who waits is to call"""


class Staged:
    """Written by one thread, read by many."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: str | torch.device,
        *,
        in_main_memory: bool = False,
    ) -> None:
        """`device`: that sends."""
        self.device = torch.device(device)
        if in_main_memory and self.device.type == "cuda":
            self._tensors = {n: torch.zeros(shape, dtype=dtype, pin_memory=True) for n, shape in shapes.items()}
        else:
            self._tensors = {n: torch.zeros(shape, dtype=dtype, device=self.device) for n, shape in shapes.items()}
        self._version = -1
        self._changed = threading.Condition()
        self._readers: list[str] = []
        self._writing = False

    @property
    def version(self) -> int:
        """-1 before the first."""
        return self._version

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As a module's, in an order that never changes; only while `held`."""
        yield from self._tensors.items()

    def on_device(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one after another on the device that sends."""
        for name, tensor in self._tensors.items():
            yield name, tensor.to(self.device)

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        seconds: float,
        still: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over a newer version. `still` is called every `LOOK_S` while transfers hold the old one. Raises
        RunFailed when they do for longer than `seconds`, ValueError for other tensors than announced."""
        with self._changed:
            if version <= self._version:
                raise ValueError(f"version {version} is not newer than {self._version}")
            self._writing = True
            try:
                deadline = time.monotonic() + seconds
                while self._readers and (left := deadline - time.monotonic()) > 0:
                    still()
                    self._changed.wait_for(lambda: not self._readers, min(left, LOOK_S))
                if self._readers:
                    raise RunFailed(
                        f"trainer waited {seconds:g} s for {', '.join(self._readers)} to take weights version "
                        f"{self._version}, and the transfer cannot be ended; resume the run"
                    )
                self._copy(tensors)
                self._version = version
            finally:
                self._writing = False
                self._changed.notify_all()

    def _copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        missing = set(self._tensors)
        with torch.no_grad():
            for name, tensor in tensors:
                mine = self._tensors.get(name)
                if mine is None or mine.shape != tensor.shape:
                    raise ValueError(f"{name} {tuple(tensor.shape)} is not among the tensors announced")
                mine.copy_(tensor)
                missing.discard(name)
        if missing:
            raise ValueError(f"other tensors than announced: {sorted(missing)[:5]} did not come")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other threads send from other streams

    @contextmanager
    def held(self, who: str, seconds: float) -> Iterator[int]:
        """The version there is, which stays for as long as this lasts. Raises RunFailed after `seconds`."""
        with self._changed:
            began = time.monotonic()
            if not self._changed.wait_for(lambda: not self._writing, seconds):
                raise RunFailed(f"{who} waited {time.monotonic() - began:.0f} s for the trainer to copy its weights")
            self._readers.append(who)
        try:
            yield self._version
        finally:
            with self._changed:
                self._readers.remove(who)
                self._changed.notify_all()
