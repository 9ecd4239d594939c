"""Weights of a trainer whose rank 0 is on another machine than the run: into the run's shared memory, over the network.

Rank 0 connects to the run's weight server (`WeightUpload`) and says that it has a version. The server fetches it in
chunks over that connection, as a generator fetches weights from the server, and publishes it in shared memory
(`Intake` in weights/stream.py). From there on all is as with a trainer beside the buffer: generators of that host map
it, others get it from the weight server. Rank 0 listens on nothing, and has no key of a server.

Who waits for whom: rank 0 waits until the server has the whole version, as long as chunks are asked for; only then it
is announced. The server waits for nobody.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from async_rl.errors import RunFailed
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import WeightPublisher, WeightReader, shared_folder
from async_rl.weights.stream import READ_POLL_S, RETRY_S, Shelf
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.keys import Keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IDENTITY = "trainer/weights"


class WeightUpload:
    """The trainer's end: a `Publisher` (trainer/publish.py). It keeps the last two versions in memory of its own."""

    def __init__(
        self,
        endpoint: str,
        layout: Mapping[str, Tensor],
        *,
        keys: Keys | None,
        timeout_s: float,
        dtype: torch.dtype | None = None,
        keepalive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            endpoint: of the run's weight server.
            layout, dtype: as of `WeightPublisher`.
            timeout_s: longest time in which the server asks for nothing.
            keepalive: called often while the main thread waits.

        Raises UserError when the memory is too small.
        """
        self._endpoint, self._keys, self._timeout_s, self._keepalive = endpoint, keys, timeout_s, keepalive
        path = (shared_folder() or Path(tempfile.gettempdir())) / f"async-rl-upload-{os.getpid()}"
        self._segment = WeightPublisher(path, layout, dtype=dtype)
        self._reader = WeightReader(path)
        self._reader.latest()  # it is mapped now
        path.unlink()  # so nothing stays behind, however this process ends

    def publish(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Returns when the run's host has the whole version. Raises RunFailed when it does not take it."""
        self._segment.publish(tensors, version)
        # a socket of this publication: the next one may come from another thread
        with Dealer(self._endpoint, IDENTITY, keys=self._keys) as dealer:
            self._serve(dealer, version)

    def held(self) -> dict[int, dict[str, Tensor]]:
        """As `WeightPublisher.held`."""
        return self._segment.held()

    def close(self) -> None:
        self._reader.close()
        self._segment.close()

    def _serve(self, dealer: Dealer, version: int) -> None:
        shelf = Shelf(self._reader.latest, self._reader.view)
        dealer.send(msg.Upload(version=version))
        heard = progress = time.monotonic()
        here = threading.current_thread() is threading.main_thread()
        while True:
            if here:
                self._keepalive()
            try:
                message = dealer.receive(READ_POLL_S, "the weight server")
            except WireTimeout:
                now = time.monotonic()
                if now - heard > RETRY_S:
                    heard = now
                    dealer.send(msg.Upload(version=version))
                if now - progress > self._timeout_s:
                    raise RunFailed(
                        f"waited {self._timeout_s:g} s (wire.timeout_s) for the run's weight server at "
                        f"{self._endpoint} to fetch version {version}; can it be reached from this machine?"
                    ) from None
                continue
            except WireError as error:
                raise RunFailed(f"the weight server {self._endpoint} speaks otherwise: {error}") from None
            heard = time.monotonic()
            match message:
                case msg.Holds(version=held) if held >= version:
                    return
                case msg.Refused(reason=reason):
                    raise RunFailed(f"the weight server {self._endpoint} does not take version {version}: {reason}")
                case msg.AskWeights() | msg.AskChunks():
                    progress = heard
                    for reply in shelf.handle(b"", message, heard):
                        dealer.send(reply)
