"""A relay: a machine fetches each version of the weights once and passes it on, to the generators beside it and to
other relays.

`Relay` is a pure state machine: messages of its readers and of its parent in, messages to both out, the clock passed
in. Towards its readers it is a weight server, towards its parent a reader. A chunk goes on as soon as it is here, long
before the version is whole: a chain of relays takes little longer than one copy (bench/relays.py). It fetches nothing
that no reader wants.

Invariant: what it offers is its parent's offer, byte for byte: version, layout and checksum are the weight server's,
and each reader checks them itself. A version that the parent withdraws is withdrawn from the readers, too.

Who waits for whom: readers wait for the relay, which tells them every second that it is there; the relay waits for its
parent, and asks the weight server for another one when it is silent.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from async_rl.errors import RunFailed
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import WeightsError
from async_rl.weights.stream import HeldCopy, Transfer
from async_rl.wire import messages as msg
from async_rl.wire.channel import Dealer, Router, WireTimeout, wait_any
from async_rl.wire.keys import Keys, RelayKeys

MOST_HELD = 2
"""versions in memory at once: one that is being fetched and the one before"""
ANSWER_S = 1.0
"""a reader that asks for newer weights gets what is here when the parent has not answered for so long"""
NOTICE_S = 1.0
"""a reader whose chunks are not here yet is told so in this interval"""
SILENT_S = 5.0
"""a parent that has said nothing for so long is taken for lost; a sound one says something every NOTICE_S"""
RENEW_S = 4.0
"""a relay tells the weight server in this interval that it is there"""
POLL_S = 0.2
"""longest wait for a message"""


@dataclass(slots=True, kw_only=True)
class Held(HeldCopy):
    """A version that readers fetch, whole or on its way."""

    transfer: Transfer

    def has(self, index: int) -> bool:
        return self.transfer.whole or index not in self.transfer.missing


@dataclass(slots=True)
class Relay:
    """The state of a relay. Its methods take what arrives; the caller then sends `to_readers` and `to_parent`, and
    clears them."""

    held: dict[int, Held] = field(default_factory=dict)
    transfer: Transfer | None = None
    """the fetch from the parent that is under way, or its question for newer weights"""
    asking: dict[bytes, tuple[int, float]] = field(default_factory=dict)
    """readers that want an offer: peer -> (newer than this version, time of its question)"""
    waiting: dict[tuple[int, int], dict[bytes, None]] = field(default_factory=dict)
    """(version, chunk) that is not here yet -> the readers that asked for it"""
    reason: str = "nothing has come yet"
    """why the parent has nothing newer"""
    heard_at: float = 0.0
    """time of the parent's last message, or of the question that it owes an answer to"""
    noticed_at: float = 0.0
    to_readers: list[tuple[bytes, msg.Message]] = field(default_factory=list)
    to_parent: list[msg.Message] = field(default_factory=list)

    def from_reader(self, peer: bytes, message: msg.Message, now: float) -> None:
        """Handle a message of a reader."""
        match message:
            case msg.AskWeights(after=after):
                for held in self.held.values():
                    held.readers.pop(peer, None)
                self.asking[peer] = (after, now)
                if self.transfer is None:
                    self.transfer = Transfer(max(self.held, default=-1))
                    self.heard_at = now
                    self.to_parent += self.transfer.begin(now)
                elif self.transfer.offer is not None:
                    self._answer_asking(now)
            case msg.AskChunks(version=version, chunks=chunks):
                self._give(peer, version, chunks, now)
            case _:
                reason = "a relay of weights does not take this kind"
                self.to_readers.append((peer, msg.Refused(what=type(message).__name__, reason=reason)))

    def from_parent(self, message: msg.Message, now: float) -> None:
        """Handle a message of the parent. Raises WeightsError for an impossible offer."""
        transfer = self.transfer
        if transfer is None:
            return
        self.heard_at = now
        before = transfer.offer
        self.to_parent += transfer.receive(message, now)
        if before is not None and transfer.offer is None:
            self._withdraw(before.version)
        if before is None and transfer.offer is not None:
            self._hold(transfer, transfer.offer)
            self._answer_asking(now)
        if before is None and transfer.offer is None and isinstance(message, msg.Waiting):
            self.reason = message.reason
            self.transfer = None  # a reader that still wants newer weights asks again
            self._answer_asking(now)
        if isinstance(message, msg.Chunk) and before is not None and transfer.offer is not None:
            self._pass_on(message.version, message.index)
        if transfer.whole:
            self.transfer = None

    def new_parent(self, now: float) -> None:
        """The parent is another one: go on where the last one stopped."""
        self.heard_at = now
        if self.transfer is not None:
            self.to_parent = self.transfer.resume(now)

    def silent_s(self, now: float) -> float:
        """For how long the parent has owed an answer; 0 when it owes none."""
        return now - self.heard_at if self.transfer is not None else 0.0

    def tick(self, now: float) -> None:
        """Repeat what was not answered, tell readers that their chunks are under way, drop what nobody fetches."""
        if self.transfer is not None:
            self.to_parent += self.transfer.tick(now)
        if any(now - asked_at > ANSWER_S for _, asked_at in self.asking.values()):
            self._answer_asking(now)
        if now - self.noticed_at >= NOTICE_S:
            self.noticed_at = now
            for peer in {peer for peers in self.waiting.values() for peer in peers}:
                notice = msg.Waiting(what="chunks", reason="they are on their way to the relay", seconds=0.0)
                self.to_readers.append((peer, notice))
        for held in self.held.values():
            held.forget_silent(now)
        newest = max(self.held, default=-1)
        for version in [v for v, held in self.held.items() if held.transfer.whole and not held.readers and v != newest]:
            del self.held[version]

    def _answer_asking(self, now: float) -> None:
        best = max(self.held, default=-1)
        for peer, (after, _) in self.asking.items():
            if best > after:
                self.held[best].readers[peer] = now
                self.to_readers.append((peer, self.held[best].offer))
            else:
                waiting = msg.Waiting(what=f"weights after version {after}", reason=self.reason, seconds=0.0)
                self.to_readers.append((peer, waiting))
        self.asking.clear()

    def _hold(self, transfer: Transfer, offer: msg.Offer) -> None:
        while len(self.held) >= MOST_HELD:
            whole = [version for version, held in self.held.items() if held.transfer.whole]
            self._withdraw(min(whole, key=lambda version: (len(self.held[version].readers) > 0, version)))
        self.held[offer.version] = Held(offer=offer, content=transfer.content, transfer=transfer)

    def _give(self, peer: bytes, version: int, chunks: tuple[int, ...], now: float) -> None:
        held = self.held.get(version)
        if held is None:
            self.to_readers.append((peer, msg.Withdrawn(version=version)))
            return
        if (refused := held.refusal(chunks)) is not None:
            self.to_readers.append((peer, refused))
            return
        held.readers[peer] = now
        for index in chunks:
            if held.has(index):
                self.to_readers.append((peer, held.chunk(index)))
            else:
                self.waiting.setdefault((version, index), {})[peer] = None

    def _pass_on(self, version: int, index: int) -> None:
        held = self.held.get(version)
        if held is None or not held.has(index):
            return  # it was damaged, and is asked for again
        for peer in self.waiting.pop((version, index), ()):
            self.to_readers.append((peer, held.chunk(index)))

    def _withdraw(self, version: int) -> None:
        held = self.held.pop(version, None)
        for key in [key for key in self.waiting if key[0] == version]:
            del self.waiting[key]
        for peer in held.readers if held is not None else ():
            self.to_readers.append((peer, msg.Withdrawn(version=version)))


@dataclass(slots=True)
class RelayProcess:
    """A relay around its sockets."""

    server: str
    """endpoint of the weight server"""
    listen: str
    """where readers reach this relay, tcp://HOST:PORT as it is bound"""
    reached: str
    """the same as other machines reach it; empty: as it is bound"""
    keys: Keys
    timeout_s: float
    """longest silence of the weight server"""
    log: Callable[[str], None]
    """writes a line for the user"""
    name: str = field(default_factory=lambda: f"relay/{uuid.uuid4().hex[:8]}")
    relay: Relay = field(default_factory=Relay)
    parent: str = ""
    """endpoint of the relay that it fetches from; empty: the weight server"""
    placed: bool = False
    """whether the weight server has said whom to fetch from"""
    lost: str = ""
    """a parent of which nothing is heard"""
    heard_at: float = 0.0
    """time of the weight server's last message"""
    renewed_at: float = -RENEW_S
    ended: str = ""
    """why the weight server said that this is over"""

    def run(self) -> str:
        """Relay until the run ends; why it did. Raises UserError for a taken endpoint, RunFailed when the weight server
        is gone."""
        above: Dealer | None = None
        self.heard_at = time.monotonic()
        with (
            Router(self.listen, keys=RelayKeys(self.keys.folder)) as readers,
            Dealer(self.server, self.name, keys=self.keys) as server,
        ):
            self.reached = self.reached or readers.endpoint
            self.log(f"relays weights of {self.server} at {readers.endpoint}; Ctrl-C ends it")
            try:
                while not self.ended:
                    ends = (readers, server) if above is None else (readers, server, above)
                    wait_any(ends, POLL_S)
                    now = time.monotonic()
                    self._hear_server(server, now)
                    if above is not None:
                        self._hear_parent(above, now)
                    self._hear_readers(readers, now)
                    self.relay.tick(now)
                    above = self._keep_parent(server, above, now)
                    self._send(readers, above or server)
            finally:
                if above is not None:
                    above.close(linger_s=0)
        return self.ended

    def _hear_server(self, server: Dealer, now: float) -> None:
        while (message := _next(server)) is not None:
            self.heard_at = now
            match message:
                case msg.Parent(endpoint=endpoint):
                    self._place(endpoint)
                case msg.Stop(reason=reason):
                    self.ended = reason
                case _ if not self.parent:
                    self._take(message, now)
        if now - self.heard_at > self.timeout_s:
            raise RunFailed(
                f"the weight server {self.server} has said nothing for {self.timeout_s:g} s (wire.timeout_s): the run "
                "has ended, or it cannot be reached"
            )

    def _hear_parent(self, above: Dealer, now: float) -> None:
        while (message := _next(above)) is not None:
            self._take(message, now)

    def _take(self, message: msg.Message, now: float) -> None:
        try:
            self.relay.from_parent(message, now)
        except WeightsError as error:
            raise RunFailed(f"{self.parent or self.server}: {error}") from None

    def _hear_readers(self, readers: Router, now: float) -> None:
        while (received := readers.receive(0)) is not None:
            peer, message = received
            if isinstance(message, WireError):
                self.relay.to_readers.append((peer, msg.Refused(what="message", reason=str(message))))
            else:
                self.relay.from_reader(peer, message, now)

    def _place(self, endpoint: str) -> None:
        """The weight server says who the parent is."""
        if not self.placed:
            self.placed = True
            self.log(f"fetches from {endpoint or self.server}")
        if self.parent == endpoint:
            return  # or an answer from before it was lost
        fetching = self.relay.transfer is not None and self.relay.transfer.offer is not None
        if self.lost or not fetching:
            if self.lost:
                self.log(f"{self.lost} is silent: fetches from {endpoint or self.server} now")
            self.lost, self.parent = "", endpoint

    def _keep_parent(self, server: Dealer, above: Dealer | None, now: float) -> Dealer | None:
        """The socket to the parent; None: it is the server."""
        if self.parent != ("" if above is None else above.endpoint):
            if above is not None:
                above.close(linger_s=0)
            self.relay.new_parent(now)
            above = Dealer(self.parent, self.name, keys=RelayKeys(self.keys.folder)) if self.parent else None
        if self.parent and not self.lost and self.relay.silent_s(now) > SILENT_S:
            self.lost = self.parent
            self.renewed_at = now - RENEW_S
        if now - self.renewed_at >= RENEW_S:
            self.renewed_at = now
            with suppress(WireTimeout):
                server.send(msg.AskParent(endpoint=self.reached, lost=self.lost))
        return above

    def _send(self, readers: Router, above: Dealer) -> None:
        for peer, message in self.relay.to_readers:
            readers.send(peer, message)  # a reader that is gone comes again
        for message in self.relay.to_parent:
            with suppress(WireTimeout):
                above.send(message)
        self.relay.to_readers.clear()
        self.relay.to_parent.clear()


def _next(dealer: Dealer) -> msg.Message | None:
    """The next message that has arrived; one that cannot be decoded counts for nothing."""
    while True:
        try:
            return dealer.receive(0, "a message")
        except WireTimeout:
            return None
        except WireError:
            continue
