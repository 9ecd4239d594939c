"""Weights in chunks, both ends as pure state machines: messages in, messages out, the clock passed in.

The server's `Shelf` keeps private copies, so no publisher can overwrite what is being fetched: a reader
gets all chunks of one version, or is told to begin again. The reader's `Transfer` has only so many chunks
under way, asks again when nothing comes, and believes checksums only.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from async_rl.config import Settings
from async_rl.events import WeightsReady
from async_rl.process import run_process
from async_rl.process_spec import WeightServerSpec, read_spec
from async_rl.run_folder import RunFolder
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import Copied, Slot, WeightReader, WeightsError, from_text, segment_path, tensor_of
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router, WireTimeout
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import Keys, keys_in

if TYPE_CHECKING:
    from torch import Tensor


CHUNK_BYTES = 1 << 20
CREDIT = 8
"""chunks under way to one reader"""
MOST_COPIES = 2
"""versions kept at once: one that is being fetched and a newer one"""
HOLD_S = 10.0
"""a reader that has asked for nothing for so long is gone"""
AGAIN_S = 3.0
"""a reader that has heard nothing for so long asks again"""
MOST_CHUNK_BYTES = 1 << 28
"""a larger chunk is not believed"""


# ---------------------------------------------------------------------------------------- server


@dataclass(slots=True, kw_only=True)
class Copy:
    """One version, for those who fetch it."""

    copied: Copied
    checksum: int
    readers: dict[bytes, float] = field(default_factory=dict)
    """peer -> when it asked last"""


@dataclass(slots=True)
class Shelf:
    """What a weight server has to give."""

    latest: Callable[[], int]
    """newest version published; -1: none yet"""
    take: Callable[[], Copied | None]
    """a copy of it; None: not now"""
    chunk_bytes: int = CHUNK_BYTES
    copies: dict[int, Copy] = field(default_factory=dict)

    def handle(self, peer: bytes, message: msg.Message, now: float) -> list[msg.Message]:
        """The answers to one message."""
        match message:
            case msg.AskWeights(after=after):
                return [self._offer(peer, after, now)]
            case msg.AskChunks(version=version, chunks=chunks):
                return self._chunks(peer, version, chunks, now)
            case _:
                reason = "the weight server does not take this kind"
                return [msg.Refused(what=type(message).__name__, reason=reason)]

    def tick(self, now: float) -> None:
        """Drop what nobody fetches any more."""
        for version in list(self.copies):
            readers = self.copies[version].readers
            for peer in [peer for peer, asked_at in readers.items() if now - asked_at > HOLD_S]:
                del readers[peer]
            if not readers:
                del self.copies[version]

    def _offer(self, peer: bytes, after: int, now: float) -> msg.Message:
        for copy in self.copies.values():
            copy.readers.pop(peer, None)
        newest = self.latest()
        if newest > after and newest not in self.copies:
            self.tick(now)
            copied = self.take() if len(self.copies) < MOST_COPIES else None
            if copied is not None and copied.version not in self.copies:
                self.copies[copied.version] = Copy(copied=copied, checksum=zlib.crc32(copied.content.data))
        best = max(self.copies, default=-1)
        if not self.copies or best <= after:
            reason = f"the newest weights are version {newest}" if newest >= 0 else "the trainer has published nothing"
            return msg.Waiting(what=f"weights after version {after}", reason=reason, seconds=0.0)
        copy = self.copies[best]
        copy.readers[peer] = now
        return msg.Offer(
            version=best,
            num_bytes=len(copy.copied.content),
            chunk_bytes=self.chunk_bytes,
            checksum=copy.checksum,
            layout=copy.copied.layout,
        )

    def _chunks(self, peer: bytes, version: int, chunks: tuple[int, ...], now: float) -> list[msg.Message]:
        copy = self.copies.get(version)
        if copy is None:
            return [msg.Withdrawn(version=version)]
        content = copy.copied.content
        count = -(-len(content) // self.chunk_bytes)
        if len(chunks) > CREDIT or not all(0 <= index < count for index in chunks):
            reason = f"at most {CREDIT} chunks at once, each below {count}"
            return [msg.Refused(what=f"AskChunks({version})", reason=reason)]
        copy.readers[peer] = now
        return [self._chunk(version, index, content) for index in chunks]

    def _chunk(self, version: int, index: int, content: NDArray[np.uint8]) -> msg.Chunk:
        part = content[index * self.chunk_bytes : (index + 1) * self.chunk_bytes].data
        return msg.Chunk(version=version, index=index, checksum=zlib.crc32(part), content=part)


# ---------------------------------------------------------------------------------------- reader


@dataclass(slots=True)
class Transfer:
    """One fetch of a version newer than `after`: send what `begin`, `hear` and `tick` return until `whole`."""

    after: int
    offer: msg.Offer | None = None
    slots: list[Slot] = field(default_factory=list)
    content: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    missing: dict[int, None] = field(default_factory=dict)
    """chunks not here yet, in the order they are asked for"""
    asked: set[int] = field(default_factory=set)
    """of them, those under way"""
    heard_at: float = 0.0
    """when anything came"""
    moved_at: float = 0.0
    """when it came nearer to its end"""
    last_word: str = ""
    damaged: int = 0
    """chunks whose checksum was wrong"""
    begun_again: int = 0
    whole: bool = False

    def begin(self, now: float) -> list[msg.Message]:
        self.heard_at = self.moved_at = now
        return [msg.AskWeights(after=self.after)]

    def hear(self, message: msg.Message, now: float) -> list[msg.Message]:
        """Take in an answer. Raises WeightsError for an offer that cannot be."""
        self.heard_at = now
        match message:
            case msg.Offer() if self.offer is None and message.version > self.after:
                self.moved_at = now
                return self._accept(message)
            case msg.Chunk() if self.offer is not None and message.version == self.offer.version:
                return self._put(message, self.offer, now)
            case msg.Withdrawn(version=version) if self.offer is not None and version == self.offer.version:
                return self._begin_again()
            case msg.Waiting(reason=reason) if self.offer is None:
                self.last_word = reason
        return []

    def tick(self, now: float) -> list[msg.Message]:
        """Ask again for what did not come."""
        patience = AGAIN_S if self.offer is not None or not self.last_word else AGAIN_S / 30
        if self.whole or now - self.heard_at < patience:
            return []
        self.heard_at = now
        if self.offer is None:
            return [msg.AskWeights(after=self.after)]
        self.asked.clear()
        return self._ask_more(self.offer)

    @property
    def waits_for(self) -> str:
        """In words."""
        if self.offer is None:
            return f"weights newer than version {self.after}" + (f" ({self.last_word})" if self.last_word else "")
        count = -(-self.offer.num_bytes // self.offer.chunk_bytes)
        return f"{len(self.missing)} of {count} chunks of version {self.offer.version}"

    def _accept(self, offer: msg.Offer) -> list[msg.Message]:
        if offer.num_bytes < 1 or not 1 <= offer.chunk_bytes <= MOST_CHUNK_BYTES:
            raise WeightsError(f"the weight server offers {offer.num_bytes} bytes in chunks of {offer.chunk_bytes}")
        try:
            self.slots = from_text(offer.layout, offer.num_bytes)
            self.content = np.empty(offer.num_bytes, np.uint8)
        except (ValueError, MemoryError) as error:
            raise WeightsError(f"the weights offered cannot be taken: their layout is {error}") from None
        self.offer = offer
        self.missing = dict.fromkeys(range(-(-offer.num_bytes // offer.chunk_bytes)))
        self.asked.clear()
        return self._ask_more(offer)

    def _put(self, chunk: msg.Chunk, offer: msg.Offer, now: float) -> list[msg.Message]:
        if chunk.index not in self.missing:
            return []  # it came twice
        start = chunk.index * offer.chunk_bytes
        room = self.content[start : start + offer.chunk_bytes]
        self.asked.discard(chunk.index)
        if len(chunk.content) != len(room) or zlib.crc32(chunk.content) != chunk.checksum:
            self.damaged += 1
            return self._ask_more(offer)
        room[:] = np.frombuffer(chunk.content, np.uint8)
        del self.missing[chunk.index]
        self.moved_at = now
        if self.missing:
            return self._ask_more(offer)
        if zlib.crc32(self.content.data) != offer.checksum:
            self.damaged += 1
            return self._begin_again()
        self.whole = True
        return []

    def _ask_more(self, offer: msg.Offer) -> list[msg.Message]:
        wanted = list(_first((i for i in self.missing if i not in self.asked), CREDIT - len(self.asked)))
        self.asked.update(wanted)
        return [msg.AskChunks(version=offer.version, chunks=tuple(wanted))] if wanted else []

    def _begin_again(self) -> list[msg.Message]:
        self.begun_again += 1
        self.offer = None
        self.last_word = ""
        return [msg.AskWeights(after=self.after)]


def _first(items: Iterable[int], count: int) -> Iterable[int]:
    for item, _ in zip(items, range(count), strict=False):
        yield item


# -------------------- client
# Weights of a run on another host, fetched from its weight server.

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


# -------------------- server
# The weight server: gives the weights of a run to generators of other hosts. Started by the launcher when
# the buffer listens on TCP.
#
# A process and a socket of its own, so that many megabytes delay neither the buffer nor the trainer: it maps
# the trainer's segment like a generator and copies a version when somebody asks for it. It waits for nobody.

POLL_S = 0.2


def serve(folder: RunFolder, settings: Settings, endpoint: str, activity: Activity) -> None:
    """Until the run has its summary, or the launcher says stop."""
    limit = settings.wire.max_message_mb << 20
    with (
        Router(endpoint, max_message_bytes=limit, keys=keys_in(settings.wire.keys)) as router,
        WeightReader(segment_path(folder.path)) as reader,
    ):
        folder.record(WeightsReady(endpoint=endpoint))
        shelf = Shelf(reader.latest, reader.copy)
        activity.looping = True
        while not folder.summary.exists():
            activity.still("serving weights")
            answer(router, shelf)
            shelf.tick(time.monotonic())


def answer(router: Router, shelf: Shelf) -> None:
    """Wait a moment for a message, and answer it."""
    received = router.receive(POLL_S)
    if received is None:
        return
    peer, message = received
    if isinstance(message, WireError):
        router.send(peer, msg.Refused(what="message", reason=str(message)))
        return
    for reply in shelf.handle(peer, message, time.monotonic()):
        router.send(peer, reply)


def main(spec: WeightServerSpec) -> None:
    """Serve weights until the run ends; ends this process."""
    folder = RunFolder(spec.path)

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        activity.now("serving weights")
        with make_heartbeat(spec.name, "weights", activity, settings.wire, None, pipe=spec.pipes.pulse):
            serve(folder, settings, spec.endpoint, activity)

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(WeightServerSpec))
