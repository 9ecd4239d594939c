"""Weights of a run on another host, fetched from its weight server."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from async_rl.trajectory.codec import WireError
from async_rl.weights.chunks import Transfer
from async_rl.weights.layout import tensor_of
from async_rl.weights.shared_memory import WeightsError
from async_rl.wire.channel import Dealer, WireTimeout
from async_rl.wire.keys import Keys

if TYPE_CHECKING:
    from torch import Tensor

_POLL_S = 0.1


class WeightStream:
    """What `WeightReader` is on the trainer's host. One thread at a time reads."""

    def __init__(self, endpoint: str, identity: str, *, keys: Keys, timeout_s: float) -> None:
        """`timeout_s`: longest time without progress. Nothing is waited for here."""
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._dealer = Dealer(endpoint, identity, keys=keys)
        self._version = -1

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """A version newer than the one read last, and its tensors, which the caller owns.

        Raises WeightsError, saying what was waited for, when nothing comes for `timeout_s`."""
        import torch

        transfer = self._fetch()
        assert transfer.offer is not None
        self._version = transfer.offer.version
        whole = torch.from_numpy(transfer.content)
        return self._version, {slot.name: tensor_of(whole, slot) for slot in transfer.slots}

    def _fetch(self) -> Transfer:
        transfer = Transfer(self._version)
        to_send = transfer.begin(time.monotonic())
        while not transfer.whole:
            for message in to_send:
                self._dealer.send(message)
            to_send = []
            try:
                to_send += transfer.hear(self._dealer.receive(_POLL_S, "chunks"), time.monotonic())
            except WireTimeout:
                pass
            except WireError as error:
                raise WeightsError(f"the weight server {self.endpoint} speaks otherwise: {error}") from None
            now = time.monotonic()
            to_send += transfer.tick(now)
            if now - transfer.moved_at > self._timeout_s:
                raise WeightsError(
                    f"waited {self._timeout_s:g} s (wire.timeout_s) for {transfer.waits_for} from the weight server "
                    f"{self.endpoint}; can it be reached, and is it this run's?"
                )
        return transfer

    def close(self) -> None:
        self._dealer.close(linger_s=0)

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
