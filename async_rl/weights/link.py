"""The trainer's end of links: weights that go from its GPU straight into vLLM's workers.

A generator asks for weights (AskLink). The server then sends it calls (LinkCall), one at a time, which it makes on its
vLLM, and the tensors go over the link itself: NCCL or CUDA IPC. Every generator has a link of its own, so that one that
dies takes no other with it; when it is restarted, it gets a new link.

Who waits for whom: each link waits in a thread of its own, because NCCL's waits have no timeout; the server's thread
checks all of them. A link whose generator died, or that exceeds its deadline, is closed from outside, which ends its
wait. Links send one after another, which takes no longer, since they share the sender's memory and bus; one that makes
no progress loses its turn. A generator must answer before anything is kept for it, so that one that is frozen holds
nothing. One that freezes while it is sent to holds the copy of its version; the next version goes into a second copy,
where there may be one (`Staged`), so nobody waits for it. Else a publication waits for links, never longer than the
deadline, and ends with the generator's name when a link cannot be closed.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from async_rl.errors import RunFailed
from async_rl.events import RecordEvent, WeightsLinkLost
from async_rl.trajectory.codec import WireError
from async_rl.weights import pinned
from async_rl.wire import messages as msg
from async_rl.wire.channel import Router

if TYPE_CHECKING:
    from torch import Tensor


PING_S = 1.0
"""interval of the keep-alive call while a publication waits"""
POLL_S = 0.002
"""poll interval of the server's thread while a transfer runs; otherwise tenfold"""
TURN_S = 1.0
"""a link that sends and makes no progress for so long holds the others up no further. They send one after another,
since each packs as much as the largest tensor takes on the sending GPU"""
CLOSING_S = 10.0
"""longest time for which the close of a link may wait"""


@dataclass(slots=True, kw_only=True)
class _Copy:
    """The weights of one version."""

    tensors: dict[str, Tensor]
    version: int = -1
    readers: list[str] = field(default_factory=list)


class Staged:
    """The newest version of the weights, unchanged while it is sent: a copy in the generators' dtype, in the sender's
    memory or, where only the tensors being sent must be there, in pinned main memory.

    Any number of transfers read at once. The trainer writes the next version into a copy that no transfer reads. Where
    all are read it makes another one, up to `copies`; else it waits, with a deadline, and names the generator that
    holds it up. Usually there is one copy, of the size of the model.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: str | torch.device,
        *,
        in_main_memory: bool = False,
        copies: int = 1,
    ) -> None:
        """`shapes`: of all tensors, by name; `device`: the device that sends; `copies`: most of them at once."""
        self.device = torch.device(device)
        self._shapes, self._dtype, self._most = dict(shapes), dtype, copies
        self._pinned = in_main_memory and self.device.type == "cuda"
        self._copies = [self._make()]
        self._newest = self._copies[0]
        self._changed = threading.Condition()
        self._written: _Copy | None = None
        self._waits = False
        """a writer waits for a copy: transfers that follow each other closely would never leave it one"""
        self._mine = threading.local()
        """the copy that a thread reads, inside `held`"""

    def _make(self) -> _Copy:
        if self._pinned:
            return _Copy(tensors=pinned.make_tensors(self._shapes, self._dtype, pinned.allocate_pinned))
        device, dtype = self.device, self._dtype
        return _Copy(tensors={n: torch.zeros(shape, dtype=dtype, device=device) for n, shape in self._shapes.items()})

    @property
    def version(self) -> int:
        """The newest version held; -1 before the first."""
        return self._newest.version

    @property
    def readers(self) -> list[str]:
        """Transfers that read now."""
        return [who for copy in self._copies for who in copy.readers]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as of a module, in an order that never changes. Their values: inside `held`, of the version
        held; in the thread that writes, of the newest."""
        yield from getattr(self._mine, "copy", self._newest).tensors.items()

    def on_device(self) -> Iterator[tuple[str, Tensor]]:
        """The same, moved one after another to the device that sends."""
        for name, tensor in self.named_parameters():
            yield name, tensor.to(self.device, non_blocking=True)

    def write(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        seconds: float,
        keepalive: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a newer version. `keepalive` is called every `PING_S` while transfers hold all copies. Raises
        RunFailed when they hold them for longer than `seconds`, ValueError for tensors other than announced."""
        if version <= self.version:
            raise ValueError(f"version {version} is not newer than {self.version}")
        with self._changed:
            try:
                copy = self._written = self._free_copy(seconds, keepalive)
            finally:
                self._waits = False
                self._changed.notify_all()
            copy.version = -1
        try:
            self._fill(copy, tensors)
        finally:
            with self._changed:
                self._written = None
                self._changed.notify_all()
        with self._changed:
            copy.version, self._newest = version, copy
            self._changed.notify_all()

    def _free_copy(self, seconds: float, keepalive: Callable[[], None]) -> _Copy:
        """One that no transfer reads; not the newest where there is a choice, so that transfers may go on from that."""
        deadline = time.monotonic() + seconds
        while True:
            free = [copy for copy in self._copies if not copy.readers]
            if free:
                return next((copy for copy in free if copy is not self._newest), free[0])
            if len(self._copies) < self._most:
                self._copies.append(self._make())
                return self._copies[-1]
            if (left := deadline - time.monotonic()) <= 0:
                versions = sorted({copy.version for copy in self._copies})
                raise RunFailed(
                    f"trainer waited {seconds:g} s for {', '.join(self.readers)} to take weights version "
                    f"{', '.join(map(str, versions))}, and the transfer cannot be ended; resume the run"
                )
            # New transfers wait from here on, or there would always be one. With a second copy they may begin for a
            # moment yet, so that those whose turn has come get this version.
            self._waits = self._most == 1 or seconds - left >= PING_S
            keepalive()
            self._changed.wait_for(lambda: any(not copy.readers for copy in self._copies), min(left, PING_S))

    def _fill(self, copy: _Copy, tensors: Iterable[tuple[str, Tensor]]) -> None:
        missing = set(copy.tensors)
        with torch.no_grad():
            for name, tensor in tensors:
                mine = copy.tensors.get(name)
                if mine is None or mine.shape != tensor.shape:
                    raise ValueError(f"{name} {tuple(tensor.shape)} is not among the tensors announced")
                pinned.copy_over(mine, tensor)
                missing.discard(name)
        if missing:
            raise ValueError(f"other tensors than announced: {sorted(missing)[:5]} did not come")
        if self.device.type == "cuda":
            pinned.wait_for_copies(self.device)

    @contextmanager
    def held(self, who: str, seconds: float) -> Iterator[int]:
        """Keep the newest version, which is the value, until the block ends; for the thread that calls. Raises
        RunFailed after `seconds`."""
        with self._changed:
            began = time.monotonic()
            if not self._changed.wait_for(lambda: not self._waits and self._newest is not self._written, seconds):
                raise RunFailed(f"{who} waited {time.monotonic() - began:.0f} s for the trainer to copy its weights")
            copy = self._newest
            copy.readers.append(who)
        self._mine.copy = copy
        try:
            yield copy.version
        finally:
            del self._mine.copy
            with self._changed:
                copy.readers.remove(who)
                self._changed.notify_all()


class LinkLost(Exception):
    """The transfer failed; the message says why and on which side."""


class TransferEnded(LinkLost):
    """It ended on the way through no fault of this generator, which takes it again."""


class WeightLink(Protocol):
    """The connection to one generator's workers. Made and used in a thread of its own; `close` is called in another."""

    def offer(self) -> None:
        """Connect to the generator's workers. Called once, before the first `send`."""
        ...

    def send(self) -> None:
        """Send all staged tensors. Returns when the generator holds them."""
        ...

    def close(self) -> None:
        """Give up: an `offer` or `send` that waits for the other side ends soon, with any error."""
        ...


class Control:
    """The four calls of vLLM's `VLLMWeightSyncClient`, made on the generator's vLLM through our own channel.

    Each call returns when the generator has executed it, or raises LinkLost."""

    progressed: Callable[[], None]
    """to be called when something has been sent"""

    def __init__(self, peer: str, send: Callable[[msg.Message], None], timeout_s: float) -> None:
        self.version = -1
        """of the weights that are being sent"""
        self._peer, self._send, self._timeout_s = peer, send, timeout_s
        self._number = 0
        self._answers: queue.SimpleQueue[msg.LinkAnswer | None] = queue.SimpleQueue()
        self._lost = ""
        self.progressed = lambda: None

    def ready(self) -> None:
        """The generator is there and waits for weights."""
        self._call("ready", {}, -1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init", init_info, -1)

    def start_weight_update(self) -> None:
        self._call("start", {}, self.version)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict), "the same for every worker"
        self._call("update", update_info, self.version)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's trainer side gives no version here: the staged version is meant."""
        self._call("finish", {}, self.version)

    def receive(self, answer: msg.LinkAnswer) -> None:
        self._answers.put(answer)

    def end(self, reason: str) -> None:
        """End the wait for an answer, with LinkLost."""
        self._lost = reason
        self._answers.put(None)

    def _call(self, method: str, detail: Mapping[str, Any], version: int) -> None:
        if self._lost:
            raise LinkLost(self._lost)
        self._number += 1
        self._send(msg.LinkCall(number=self._number, method=method, version=version, detail=dict(detail)))
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LinkLost(f"{self._peer} did not answer '{method}' within {self._timeout_s:g} s") from None
            if answer is None:
                raise LinkLost(self._lost)
            if answer.number == self._number:
                if answer.error:
                    raise LinkLost(f"{self._peer} could not do '{method}': {answer.error}")
                if answer.again:
                    raise TransferEnded(f"{self._peer}: {answer.again}")
                self.progressed()
                return


class Turns:
    """One link sends at a time, as long as it makes progress."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sends = ""
        self._progress_at = 0.0

    @contextmanager
    def of(self, who: str) -> Iterator[None]:
        """In the block it is the turn of `who`."""
        with self._changed:
            while self._sends and (left := self._progress_at + TURN_S - time.monotonic()) > 0:
                self._changed.wait(left)
            self._sends, self._progress_at = who, time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                if self._sends == who:
                    self._sends = ""
                self._changed.notify_all()

    def progressed(self, who: str) -> None:
        with self._changed:
            if self._sends == who:
                self._progress_at = time.monotonic()


MakeLink = Callable[[msg.AskLink, Control], WeightLink]
"""makes the link to one generator; raises UserError for one that cannot be linked"""


@dataclass(slots=True, kw_only=True)
class _Peer:
    """One generator between its start and its end, as the server sees it."""

    address: bytes
    ask: msg.AskLink
    control: Control
    process: int
    """pidfd of the generator"""
    asks: queue.SimpleQueue[msg.AskLink | None] = field(default_factory=queue.SimpleQueue)
    link: WeightLink | None = None
    given: int = -1
    """newest version sent to it"""
    busy_since: float = 0.0
    """when the running transfer began; 0: none runs"""
    failed: str = ""
    """error of its thread"""
    lost: str = ""
    """why it was given up"""


class LinkServer:
    """A publisher (`publish` and `close`, as `WeightPublisher`) that serves links in threads of its own."""

    def __init__(
        self,
        endpoint: str,
        staged: Staged,
        make_link: MakeLink,
        *,
        timeout_s: float,
        record: RecordEvent,
        closing_s: float = CLOSING_S,
        in_turns: bool = True,
        keepalive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            endpoint: a Unix socket, so that only processes of this host and this user can ask.
            timeout_s: longest time of one transfer.
            closing_s: longest time that the end of a late transfer may take beyond that.
            in_turns: one link sends at a time; else they agree among themselves (weights/broadcast.py).
            keepalive: called every `PING_S` while a publication waits for transfers.

        Raises UserError when the endpoint cannot be bound.
        """
        self._staged, self._make_link = staged, make_link
        self._timeout_s, self._closing_s, self._record, self._keepalive = timeout_s, closing_s, record, keepalive
        self._failure: Exception | None = None
        self._router = Router(endpoint)
        self._out: queue.SimpleQueue[tuple[bytes, msg.Message]] = queue.SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        """by the name of the generator"""
        self._turns = Turns() if in_turns else None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="weight-links", daemon=True)
        self._thread.start()

    def publish(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Stage a version, which generators then ask for. Raises RunFailed when a transfer of the version before can
        neither finish nor be ended, and the error of the server's thread if it ended."""
        if self._failure is not None:
            raise self._failure
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        self._staged.write(pairs, version, self._timeout_s + self._closing_s, self._keepalive)

    def close(self) -> None:
        """End every link. A link that cannot be ended is left to its daemon thread."""
        self._ending.set()
        self._thread.join(self._closing_s)
        for peer in list(self._peers.values()):
            self._give_up(peer, "the trainer ends")
        self._router.close()

    def __enter__(self) -> LinkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the server's thread

    def _serve(self) -> None:
        try:
            self._answer_all()
        except Exception as error:  # the boundary of this thread: raised at the next publication
            self._failure = error

    def _answer_all(self) -> None:
        while not self._ending.is_set():
            busy = any(peer.busy_since for peer in self._peers.values())
            received = self._router.receive(POLL_S if busy else 10 * POLL_S)
            if received is not None:
                self._handle(*received)
            with suppress(queue.Empty):
                while True:
                    self._router.send(*self._out.get_nowait())
            self._check(time.monotonic())

    def _handle(self, address: bytes, message: msg.Message | WireError) -> None:
        match message:
            case msg.LinkAnswer(session=session):
                for peer in self._peers.values():
                    if (peer.address, peer.ask.session) == (address, session):
                        peer.control.receive(message)
                        if message.error:  # the link may be sending to workers that no longer receive
                            peer.failed = f"{peer.ask.name}: {message.error}"
            case msg.AskLink():
                known = self._peers.get(message.name)
                if known is not None and known.ask.session != message.session:
                    self._give_up(known, f"{message.name} has begun anew")
                    known = None
                if known is None:
                    self._add(address, message)
                else:
                    known.asks.put(message)
            case _:
                what = "message" if isinstance(message, WireError) else type(message).__name__
                reason = str(message) if isinstance(message, WireError) else "the trainer does not take this kind here"
                self._router.send(address, msg.Refused(what=what, reason=reason))

    def _add(self, address: bytes, ask: msg.AskLink) -> None:
        try:
            process = os.pidfd_open(ask.pid)
        except OSError as error:
            reason = f"there is no process {ask.pid} here ({error.strerror})"
            self._router.send(address, msg.Refused(what="AskLink", reason=reason))
            return
        control = Control(ask.name, lambda message: self._out.put((address, message)), self._timeout_s)
        if (turns := self._turns) is not None:
            control.progressed = lambda: turns.progressed(f"{ask.name} {ask.session}")
        peer = self._peers[ask.name] = _Peer(address=address, ask=ask, control=control, process=process)
        threading.Thread(target=self._run, args=(peer,), name=f"link {ask.name}", daemon=True).start()
        peer.asks.put(ask)

    def _check(self, now: float) -> None:
        """Give up generators that failed, ended, or exceeded the deadline."""
        for peer in list(self._peers.values()):
            if peer.failed:
                self._give_up(peer, peer.failed)
            elif _has_ended(peer.process):
                self._give_up(peer, f"{peer.ask.name} (process {peer.ask.pid}) has ended")
            elif peer.busy_since and now - peer.busy_since > self._timeout_s:
                self._give_up(
                    peer,
                    f"{peer.ask.name} did not take weights version {peer.control.version} over {peer.ask.way} within "
                    f"{self._timeout_s:g} s (weights.timeout_s)",
                )

    def _give_up(self, peer: _Peer, reason: str) -> None:
        """Close a link, in a thread: its own thread may be stuck in a call that only the close ends, and the close may
        be stuck itself."""
        del self._peers[peer.ask.name]
        peer.lost = reason
        peer.control.end(reason)
        peer.asks.put(None)
        os.close(peer.process)
        if peer.link is not None:
            threading.Thread(target=_close, args=(peer.link,), name=f"close {peer.ask.name}", daemon=True).start()
        if not self._ending.is_set():
            self._record(WeightsLinkLost(name=peer.ask.name, way=peer.ask.way, reason=reason))
            self._out.put((peer.address, msg.Refused(what="AskLink", reason=reason)))

    # ------------------------------------------------------------------ a link's thread

    def _run(self, peer: _Peer) -> None:
        while (ask := peer.asks.get()) is not None:
            peer.busy_since = time.monotonic()
            try:
                self._transfer(peer, ask)
            except LinkLost as error:
                peer.failed = str(error)
                return
            except Exception as error:  # the boundary of this thread: reported, and it ends this link
                peer.failed = f"{peer.ask.way} failed for {peer.ask.name}: {type(error).__name__}: {error}"
                return
            peer.busy_since = 0.0

    def _transfer(self, peer: _Peer, ask: msg.AskLink) -> None:
        if peer.lost or ask.after < peer.given:  # it asked twice for a version that was sent
            return
        if self._staged.version <= ask.after:
            self._out.put((peer.address, _none_newer(ask.after, self._staged.version)))
            return
        peer.control.ready()  # nothing is kept, and no group is opened, for one that is frozen
        if peer.link is None:
            peer.link = self._make_link(ask, peer.control)
            peer.link.offer()
        with self._staged.held(peer.ask.name, self._timeout_s) as version:
            if peer.lost:
                raise LinkLost(peer.lost)
            peer.control.version = version
            with self._turns.of(f"{ask.name} {ask.session}") if self._turns else nullcontext():
                peer.busy_since = time.monotonic()  # its own time begins now
                peer.link.send()
            peer.given = version


def _none_newer(after: int, newest: int) -> msg.Waiting:
    reason = f"the newest weights are version {newest}" if newest >= 0 else "the trainer has published nothing"
    return msg.Waiting(what=f"weights after version {after}", reason=reason, seconds=0.0)


def _has_ended(process: int) -> bool:
    watched = select.poll()
    watched.register(process, select.POLLIN)
    return bool(watched.poll(0))


def _close(link: WeightLink) -> None:
    with suppress(Exception):  # the link is given up already
        link.close()
