"""Weights in chunks for generators on other hosts: the weight server and its readers.

Both ends are pure state machines: messages in, messages out, the clock passed in. The server's `Shelf` keeps private
copies, so the publisher cannot overwrite what is being fetched: a reader gets all chunks of one version, or is told to
start again. The reader's `Transfer` requests a limited number of chunks at a time, repeats requests that get no answer,
and accepts only chunks with the right checksum. `WeightStream` is the reader around a socket.

The server runs when the buffer listens on TCP. It is a process with a socket of its own, so that many megabytes delay
neither the buffer nor the trainer: it maps the trainer's segment as a generator does and copies a version on request.
It waits for no other process.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from async_rl.config import Settings
from async_rl.errors import UserError
from async_rl.events import WeightsReady
from async_rl.process import run_process
from async_rl.process_spec import WeightServerSpec, read_spec
from async_rl.run_folder import RunFolder
from async_rl.trajectory.codec import WireError
from async_rl.weights.relay_tree import RelayTree
from async_rl.weights.shared_memory import (
    TensorPlace,
    WeightCopy,
    WeightPublisher,
    WeightReader,
    WeightsError,
    layout_from_json,
    segment_path,
    tensor_of,
)
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router, WireTimeout
from async_rl.wire.heartbeat import Activity, make_heartbeat
from async_rl.wire.keys import Keys, keys_in

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20
CREDIT = 8
"""most chunks requested by one reader and not yet received"""
MOST_COPIES = 2
"""versions kept at once: one that is being fetched and a newer one"""
HOLD_S = 40.0
"""a reader that has requested nothing for so long is taken for gone; more than LONGEST_RETRY_S"""
RETRY_S = 3.0
"""a reader that has received nothing for so long repeats its request, and waits twice as long the next time"""
LONGEST_RETRY_S = 30.0
MOST_CHUNK_BYTES = 1 << 28
"""an offer of larger chunks is refused"""
SERVE_POLL_S = 0.2
"""longest wait of the server for one message"""
READ_POLL_S = 0.1
"""longest wait of a reader for one message"""


def count_chunks(offer: msg.Offer) -> int:
    """Chunks that a version consists of."""
    return -(-offer.num_bytes // offer.chunk_bytes)


@dataclass(slots=True, kw_only=True)
class HeldCopy:
    """One version that readers fetch."""

    offer: msg.Offer
    content: NDArray[np.uint8]  # [bytes offered]
    sums: dict[int, int] = field(default_factory=dict)
    """crc32 of the chunks that were fetched"""
    readers: dict[bytes, float] = field(default_factory=dict)
    """peer -> time of its last request"""

    def refusal(self, chunks: tuple[int, ...]) -> msg.Refused | None:
        """Why these chunks cannot be asked for; None: they can."""
        count = count_chunks(self.offer)
        if len(chunks) <= CREDIT and all(0 <= index < count for index in chunks):
            return None
        reason = f"at most {CREDIT} chunks at once, each below {count}"
        return msg.Refused(what=f"AskChunks({self.offer.version})", reason=reason)

    def chunk(self, index: int) -> msg.Chunk:
        size = self.offer.chunk_bytes
        part = self.content[index * size : (index + 1) * size].data
        if index not in self.sums:
            self.sums[index] = zlib.crc32(part)
        return msg.Chunk(version=self.offer.version, index=index, checksum=self.sums[index], content=part)

    def forget_silent(self, now: float) -> None:
        """Forget readers that have asked for nothing for HOLD_S."""
        for peer in [peer for peer, asked_at in self.readers.items() if now - asked_at > HOLD_S]:
            del self.readers[peer]


@dataclass(slots=True)
class Shelf:
    """The server's end: the versions that readers can fetch."""

    latest: Callable[[], int]
    """newest version published; -1: none yet"""
    take: Callable[[], WeightCopy | None]
    """a copy of it; None: not possible now"""
    chunk_bytes: int = CHUNK_BYTES
    copies: dict[int, HeldCopy] = field(default_factory=dict)

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
        """Drop versions that no reader fetches any more."""
        for version in list(self.copies):
            self.copies[version].forget_silent(now)
            if not self.copies[version].readers:
                del self.copies[version]

    def _offer(self, peer: bytes, after: int, now: float) -> msg.Message:
        for copy in self.copies.values():
            copy.readers.pop(peer, None)
        newest = self.latest()
        if newest > after and newest not in self.copies:
            self.tick(now)
            copied = self.take() if len(self.copies) < MOST_COPIES else None
            if copied is not None and copied.version not in self.copies:
                self.copies[copied.version] = self._held(copied)
        best = max(self.copies, default=-1)
        if not self.copies or best <= after:
            reason = f"the newest weights are version {newest}" if newest >= 0 else "the trainer has published nothing"
            return msg.Waiting(what=f"weights after version {after}", reason=reason, seconds=0.0)
        copy = self.copies[best]
        copy.readers[peer] = now
        return copy.offer

    def _held(self, copied: WeightCopy) -> HeldCopy:
        offer = msg.Offer(
            version=copied.version,
            num_bytes=len(copied.content),
            chunk_bytes=self.chunk_bytes,
            checksum=zlib.crc32(copied.content.data),
            layout=copied.layout,
        )
        return HeldCopy(offer=offer, content=copied.content)

    def _chunks(self, peer: bytes, version: int, chunks: tuple[int, ...], now: float) -> list[msg.Message]:
        copy = self.copies.get(version)
        if copy is None:
            return [msg.Withdrawn(version=version)]
        if (refused := copy.refusal(chunks)) is not None:
            return [refused]
        copy.readers[peer] = now
        return [copy.chunk(index) for index in chunks]


@dataclass(slots=True)
class Transfer:
    """The reader's end: one fetch of a version newer than `after`. Send the messages that `begin`, `receive` and `tick`
    return until `whole`."""

    after: int
    offer: msg.Offer | None = None
    places: list[TensorPlace] = field(default_factory=list)
    content: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))  # [bytes offered]
    missing: dict[int, None] = field(default_factory=dict)
    """chunks not received yet, in the order of requests"""
    requested: set[int] = field(default_factory=set)
    """of them, those requested"""
    received_at: float = 0.0
    """time of the last message"""
    progress_at: float = 0.0
    """time of the last offer or chunk"""
    patience_s: float = RETRY_S
    """silence after which chunks are asked for again: where many share a slow line that is no loss, and each repetition
    would bring its chunks twice"""
    reason: str = ""
    """why the server has nothing newer"""
    damaged: int = 0
    """chunks whose checksum was wrong"""
    restarts: int = 0
    begun: msg.Offer | None = None
    """a version that was withdrawn before it was whole: what has come of it stays, in case it is offered again"""
    whole: bool = False

    def begin(self, now: float) -> list[msg.Message]:
        self.received_at = self.progress_at = now
        return [msg.AskWeights(after=self.after)]

    def receive(self, message: msg.Message, now: float) -> list[msg.Message]:
        """Handle an answer. Raises WeightsError for an impossible offer."""
        self.received_at = now
        match message:
            case msg.Offer() if self.offer is None and message.version > self.after:
                self.progress_at = now
                return self._accept(message)
            case msg.Chunk() if self.offer is not None and message.version == self.offer.version:
                return self._put(message, self.offer, now)
            case msg.Withdrawn(version=version) if self.offer is not None and version == self.offer.version:
                return self._restart()
            case msg.Waiting(reason=reason) if self.offer is None:
                self.reason = reason
        return []

    def tick(self, now: float) -> list[msg.Message]:
        """Repeat requests that were not answered."""
        pause_s = self.patience_s if self.offer is not None or not self.reason else RETRY_S / 30
        if self.whole or now - self.received_at < pause_s:
            return []
        if self.offer is not None:
            self.patience_s = min(2 * self.patience_s, LONGEST_RETRY_S)
        return self.resume(now)

    def resume(self, now: float) -> list[msg.Message]:
        """Go on with another server: what to ask it."""
        self.received_at = now
        if self.offer is None:
            return [msg.AskWeights(after=self.after)]
        self.requested.clear()
        return self._request_more(self.offer)

    @property
    def waits_for(self) -> str:
        """What is missing, for messages."""
        if self.offer is None:
            return f"weights newer than version {self.after}" + (f" ({self.reason})" if self.reason else "")
        return f"{len(self.missing)} of {count_chunks(self.offer)} chunks of version {self.offer.version}"

    def _accept(self, offer: msg.Offer) -> list[msg.Message]:
        if offer.num_bytes < 1 or not 1 <= offer.chunk_bytes <= MOST_CHUNK_BYTES:
            raise WeightsError(f"the weight server offers {offer.num_bytes} bytes in chunks of {offer.chunk_bytes}")
        if offer == self.begun:
            self.offer, self.begun = offer, None
            return self._request_more(offer)
        try:
            self.places = layout_from_json(offer.layout, offer.num_bytes)
            self.content = np.empty(offer.num_bytes, np.uint8)
        except (ValueError, MemoryError) as error:
            raise WeightsError(f"the weights offered cannot be taken: their layout is {error}") from None
        self.offer = offer
        self.missing = dict.fromkeys(range(count_chunks(offer)))
        self.requested.clear()
        return self._request_more(offer)

    def _put(self, chunk: msg.Chunk, offer: msg.Offer, now: float) -> list[msg.Message]:
        if chunk.index not in self.missing:
            return []  # a repeated request was answered twice
        start = chunk.index * offer.chunk_bytes
        room = self.content[start : start + offer.chunk_bytes]
        self.requested.discard(chunk.index)
        if len(chunk.content) != len(room) or zlib.crc32(chunk.content) != chunk.checksum:
            self.damaged += 1
            return self._request_more(offer)
        room[:] = np.frombuffer(chunk.content, np.uint8)
        del self.missing[chunk.index]
        self.progress_at = now
        if self.missing:
            return self._request_more(offer)
        if zlib.crc32(self.content.data) != offer.checksum:
            self.damaged += 1
            self.offer = None  # nothing of it can be used
            return self._restart()
        self.whole = True
        return []

    def _request_more(self, offer: msg.Offer) -> list[msg.Message]:
        wanted = list(_first((i for i in self.missing if i not in self.requested), CREDIT - len(self.requested)))
        self.requested.update(wanted)
        return [msg.AskChunks(version=offer.version, chunks=tuple(wanted))] if wanted else []

    def _restart(self) -> list[msg.Message]:
        self.restarts += 1
        self.begun, self.offer = self.offer, None
        self.requested.clear()
        self.reason = ""
        return [msg.AskWeights(after=self.after)]


def _first(items: Iterable[int], count: int) -> Iterable[int]:
    for item, _ in zip(items, range(count), strict=False):
        yield item


class WeightStream:
    """Reads weights from the server, as `WeightReader` does on the trainer's host. One thread at a time reads."""

    def __init__(self, endpoint: str, identity: str, *, keys: Keys, timeout_s: float) -> None:
        """`timeout_s`: longest time without progress. The constructor waits for nothing."""
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._dealer = Dealer(endpoint, identity, keys=keys)
        self._version = -1

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """(version, tensors): a version newer than the last one read. The caller owns the tensors.

        Raises WeightsError, which names what is missing, when there is no progress for `timeout_s`."""
        import torch

        transfer = self._fetch()
        assert transfer.offer is not None
        self._version = transfer.offer.version
        whole = torch.from_numpy(transfer.content)
        return self._version, {place.name: tensor_of(whole, place) for place in transfer.places}

    def _fetch(self) -> Transfer:
        transfer = Transfer(self._version)
        to_send = transfer.begin(time.monotonic())
        while not transfer.whole:
            for message in to_send:
                self._dealer.send(message)
            to_send = []
            try:
                to_send += transfer.receive(self._dealer.receive(READ_POLL_S, "chunks"), time.monotonic())
            except WireTimeout:
                pass
            except WireError as error:
                raise WeightsError(f"the weight server {self.endpoint} speaks otherwise: {error}") from None
            now = time.monotonic()
            to_send += transfer.tick(now)
            if now - transfer.progress_at > self._timeout_s:
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


@dataclass(slots=True)
class Intake:
    """The server's end of what rank 0 of a trainer on another machine sends (weights/upload.py)."""

    publish: Callable[[Transfer], None]
    """a version is whole"""
    held: int = -1
    """the newest version that was published here"""
    peer: bytes = b""
    """the trainer; empty: none has come"""
    transfer: Transfer | None = None
    """the version that is being fetched"""

    def handle(self, peer: bytes, message: msg.Message, now: float) -> list[msg.Message]:
        """The answers to one message."""
        if self.peer not in (b"", peer):
            return [msg.Refused(what=type(message).__name__, reason="there is a trainer already")]
        match message:
            case msg.Upload(version=version):
                self.peer = peer
                if version <= self.held:
                    return [msg.Holds(version=self.held)]
                if self.transfer is not None:
                    return self.transfer.resume(now)  # it asks again because nothing came
                self.transfer = Transfer(self.held)
                return self.transfer.begin(now)
            case msg.Offer() | msg.Chunk() if self.transfer is not None:
                try:
                    return self._receive(message, self.transfer, now)
                except (WeightsError, UserError) as error:
                    self.transfer = None
                    return [msg.Refused(what="Upload", reason=str(error))]
        return []

    def _receive(self, message: msg.Message, transfer: Transfer, now: float) -> list[msg.Message]:
        asks = transfer.receive(message, now)
        if not transfer.whole or transfer.offer is None:
            return asks
        self.publish(transfer)
        self.held, self.transfer = transfer.offer.version, None
        return [msg.Holds(version=self.held)]

    def tick(self, now: float) -> list[msg.Message]:
        """Repeat, to `peer`, what was not answered."""
        return [] if self.transfer is None else self.transfer.tick(now)


@dataclass(slots=True)
class SegmentOfIntake:
    """The run's shared memory, written by the weight server."""

    path: Path
    made: list[WeightPublisher] = field(default_factory=list)
    """one, from the first version on"""

    def publish(self, transfer: Transfer) -> None:
        import torch

        assert transfer.offer is not None
        whole = torch.from_numpy(transfer.content)
        tensors = {place.name: tensor_of(whole, place) for place in transfer.places}
        if not self.made:
            self.made.append(WeightPublisher(self.path, tensors))
        self.made[0].publish(tensors, transfer.offer.version)


def make_intake(folder: RunFolder, settings: Settings, reader: WeightReader) -> Intake | None:
    """Of the run's weight server; None where the run starts its trainer itself, beside it. `reader`: of the run's
    segment."""
    if settings.trainer.start != "external":
        return None
    try:
        held = reader.latest()  # of a server before this one
    except WeightsError:
        held = -1
    return Intake(SegmentOfIntake(segment_path(folder.path)).publish, held=held)


def serve(folder: RunFolder, settings: Settings, endpoint: str, activity: Activity) -> None:
    """Serve until the run has its summary; the launcher may end the process before."""
    limit = settings.wire.max_message_mb << 20
    with (
        Router(endpoint, max_message_bytes=limit, keys=keys_in(settings.wire.keys)) as router,
        WeightReader(segment_path(folder.path)) as reader,
    ):
        folder.record(WeightsReady(endpoint=endpoint))
        shelf, relays = Shelf(reader.latest, reader.copy), Relays(RelayTree(settings.weights.fan_out))
        intake = make_intake(folder, settings, reader)
        activity.looping = True
        while not folder.summary.exists():
            activity.keepalive("serving weights")
            answer(router, shelf, relays, intake)
            shelf.tick(time.monotonic())
        for peer in relays.peers.values():
            router.send(peer, msg.Stop(reason="the run has ended"))


@dataclass(slots=True)
class Relays:
    """The relays that have said that they are there."""

    tree: RelayTree
    peers: dict[str, bytes] = field(default_factory=dict)
    """endpoint -> the peer"""


def answer(router: Router, shelf: Shelf, relays: Relays, intake: Intake | None = None) -> None:
    """Wait a moment for a message and answer it. `intake`: takes what a trainer on another machine sends."""
    received = router.receive(SERVE_POLL_S)
    now = time.monotonic()
    if intake is not None:
        for ask in intake.tick(now):
            router.send(intake.peer, ask)
    if received is None:
        return
    peer, message = received
    match message:
        case msg.Upload() | msg.Offer() | msg.Chunk() if intake is not None:
            for reply in intake.handle(peer, message, now):
                router.send(peer, reply)
        case WireError():
            router.send(peer, msg.Refused(what="message", reason=str(message)))
        case msg.AskParent(endpoint=endpoint, lost=lost):
            relays.peers[endpoint] = peer
            router.send(peer, msg.Parent(endpoint=relays.tree.parent_of(endpoint, now, lost)))
        case _:
            for reply in shelf.handle(peer, message, now):
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
