"""Sockets that carry messages: `Router` in the buffer, `Dealer` and `AsyncDealer` everywhere else.

Who blocks whom: see `async_rl.wire`. A socket belongs to one thread (or one event loop), but
for `Dealer.send`.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import resource
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio

from async_rl.errors import RunFailed, UserError
from async_rl.trajectory.codec import Blob, WireError
from async_rl.wire.endpoint import LONGEST_IPC_PATH, is_tcp, require_keys, socket_file
from async_rl.wire.frames import decode, encode
from async_rl.wire.keys import Gate, Keys, Reception, show_key
from async_rl.wire.messages import Message

LINGER_S = 2.0
"""how long a closing socket may still deliver what was sent"""
MAX_MESSAGE_BYTES = 1 << 30
"""largest message that is sent, and largest frame that is received; a peer that sends a larger one is disconnected"""
QUEUED_MESSAGES = 10_000
"""messages that may wait for one peer, or from one. Permits bound what is under way: a peer with so many unread
messages is frozen"""
_LARGE_FRAME_BYTES = 1024 * 1024
"""size from which sharing a frame's memory with the socket's thread costs less than a copy; a third thread must then
give the memory back under the GIL"""
UNREAD_IN, _UNREAD_OUT = 1024, 1 << 16
"""messages from one peer that may wait to be handled; messages to one peer that may wait to be read"""
_BACKLOG = 4096
"""connections that may wait to be accepted; the system's own limit may be lower (net.core.somaxconn)"""
_KEPT_BYTES = 8 * 1024 * 1024
"""memory of a few frames; up to twice as much freed memory stays with the process"""


class WireTimeout(RunFailed):
    """A wait lasted longer than its deadline. The message says who waited for what and how long."""


def wait_any(ends: Sequence[Router | Dealer], seconds: float) -> None:
    """Wait until one of these ends has a message, at most so long."""
    poller = zmq.Poller()
    for end in ends:
        poller.register(end._socket, zmq.POLLIN)
    poller.poll(max(0, round(seconds * 1000)))


def ipc_endpoint(run_folder: Path, name: str = "buffer") -> str:
    """The endpoint of a run's Unix socket: in its folder, or in the temporary folder when that path is too long."""
    path = run_folder.resolve() / f"{name}.sock"
    if len(os.fsencode(path)) > LONGEST_IPC_PATH:
        digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
        path = Path(tempfile.gettempdir()) / f"async-rl-{digest}.sock"
    return f"ipc://{path}"


class Router:
    """The buffer's end: receives from every peer, sends to the one it names, waits for none.

    A peer that comes back under its old identity takes that identity over. Over TCP, nothing is received from a peer
    without a known key.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        queued_messages: int = UNREAD_IN,
        keys: Keys | None = None,
    ) -> None:
        """`queued_messages`: messages of each peer that may wait to be handled; beyond them the peer keeps what it
        sends. `keys`: needed for tcp. Raises UserError when the endpoint is malformed or taken, or has no keys."""
        self._max_message_bytes = max_message_bytes
        self.refused: Counter[str] = Counter()
        """what could not be decoded, by WireKind"""
        self.gate: Gate | None = None
        """over TCP: who was let in"""
        self._socket_file = socket_file(endpoint)
        endpoint = require_keys(endpoint, keys)
        if self._socket_file is not None:
            _remove_stale(self._socket_file, endpoint)
        _raise_file_limit()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _set_options(self._socket, max_message_bytes)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        # against peers that flood (the limit only slows them down) or never read (no sound peer reaches that limit)
        # set once: a sender whose limit changes under way may never be told that its messages were read, and stops
        self._socket.set(zmq.RCVHWM, queued_messages)
        self._socket.set(zmq.SNDHWM, _UNREAD_OUT)
        self._socket.set(zmq.BACKLOG, _BACKLOG)  # a thousand generators may come at once
        try:
            if keys is not None and is_tcp(endpoint):
                self.gate = Gate(self._context, self._socket, keys)
            self._socket.bind(endpoint)
        except UserError:
            self._context.destroy(linger=0)
            raise
        except zmq.ZMQError as error:
            self._close(linger=0)
            raise _endpoint_error(endpoint, error) from None
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        """where it listens, with the port the system chose for tcp://HOST:*"""
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, file: int) -> None:
        """From now on `receive` waits no longer when this file is readable."""
        self._poller.register(file, zmq.POLLIN)

    def receive(self, seconds: float) -> tuple[bytes, Message | WireError] | None:
        """(peer, its message), or None when none came within `seconds`.

        What cannot be decoded comes as a `WireError` (and is counted in `refused`), so that its sender can be told."""
        if self.gate is not None and seconds > 0:
            self.gate.poll()
        if seconds > 0:
            self._poller.poll(round(seconds * 1000))
        if not self._socket.poll(0):
            return None
        frames = self._socket.recv_multipart(copy=False)
        peer = frames[0].bytes
        try:
            return peer, decode(_buffers(frames[1:]))
        except WireError as error:
            self.refused[error.kind] += 1
            return peer, error

    def send(self, peer: bytes, message: Message) -> bool:
        """Send to one peer; False when it is not there (any more) or takes nothing. Raises UserError for a message that
        exceeds the limit."""
        return self.send_frames(peer, message, encode(message))

    def send_frames(self, peer: bytes, message: Message, frames: list[Blob]) -> bool:
        """As `send`, of a message that was encoded before."""
        try:
            _send(self._socket, [peer, *_within(frames, message, self._max_message_bytes)])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        self._close(linger=round(LINGER_S * 1000))
        if self._socket_file is not None:
            self._socket_file.unlink(missing_ok=True)

    def _close(self, linger: int) -> None:
        self._socket.close(linger)  # first: without the gate anybody could connect
        if self.gate is not None:
            self.gate.close()
        self._context.destroy(linger=linger)

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class Dealer:
    """The end of the trainer and the launcher: sends to the buffer, waits for its answers until a deadline. One thread
    receives; others may send, which waits while that one does."""

    def __init__(
        self,
        endpoint: str,
        identity: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        keys: Keys | None = None,
    ) -> None:
        """`identity`: unique in the run, also the name in messages about waiting. `keys`: needed for tcp."""
        self.identity = identity
        self.endpoint = endpoint
        self._max_message_bytes = max_message_bytes
        self._used = threading.RLock()  # a socket is for one thread at a time
        self.reception: Reception | None = None
        """over TCP: whether this end was let in"""
        self._context: zmq.Context = zmq.Context()
        self._socket = _connected(self._context, endpoint, identity, max_message_bytes, keys, self._make_reception)

    def _make_reception(self, made: zmq.Socket) -> None:
        self.reception = Reception(self._context, made)

    def send(self, message: Message) -> None:
        """Returns at once; the message leaves when the buffer is there. Raises UserError for a message larger than the
        limit, WireTimeout when the buffer takes nothing any more."""
        try:
            with self._used:
                _send(self._socket, _within(encode(message), message, self._max_message_bytes))
        except zmq.Again:
            raise WireTimeout(
                f"{self.identity}: {QUEUED_MESSAGES} messages wait for the buffer, which takes none"
            ) from None

    def receive(self, seconds: float, waiting_for: str) -> Message:
        """The next message. Example: `receive(30, "the buffer's batch of step 3")`.

        Raises WireTimeout, and WireError for what cannot be decoded (it is consumed)."""
        with self._used:
            if not self._socket.poll(max(0, round(seconds * 1000))):
                raise WireTimeout(_waited(self.identity, seconds, waiting_for))
            received = self._socket.recv_multipart(copy=False)
        return decode(_buffers(received))

    def close(self, *, linger_s: float = LINGER_S) -> None:
        """`linger_s`: seconds that what was sent has to leave."""
        self._context.destroy(linger=round(linger_s * 1000))

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class AsyncDealer:
    """The generator's end, on an event loop. One task receives; any task sends."""

    def __init__(
        self,
        endpoint: str,
        identity: str,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        keys: Keys | None = None,
    ) -> None:
        self.identity = identity
        self._max_message_bytes = max_message_bytes
        self._context = zmq.asyncio.Context()
        # typed loosely: pyzmq's annotations do not tell an asyncio socket from a blocking one
        self._socket: Any = _connected(self._context, endpoint, identity, max_message_bytes, keys)

    async def send(self, message: Message) -> None:
        """Returns at once, unless the buffer has taken nothing for long; the message leaves when the buffer is there.
        Raises UserError for a message larger than the limit."""
        await self._socket.send_multipart(_within(encode(message), message, self._max_message_bytes), copy=False)

    async def receive(self, seconds: float = math.inf, waiting_for: str = "a message of the buffer") -> Message:
        """The next message. A caller that gives no deadline must watch the buffer's silence by other means.

        Raises WireTimeout, and WireError for what cannot be decoded (it is consumed). A receive that is cancelled loses
        no message."""
        timeout = None if math.isinf(seconds) else max(0, round(seconds * 1000))
        if not await self._socket.poll(timeout):
            raise WireTimeout(_waited(self.identity, seconds, waiting_for))
        return decode(_buffers(await self._socket.recv_multipart(copy=False)))

    def close(self, *, linger_s: float = LINGER_S) -> None:
        """`linger_s`: seconds that what was sent has to leave; 0 when the buffer is gone."""
        self._context.destroy(linger=round(linger_s * 1000))


def _connected(
    context: zmq.Context,
    endpoint: str,
    identity: str,
    max_message_bytes: int,
    keys: Keys | None,
    before: Callable[[zmq.Socket], None] = lambda _: None,
) -> zmq.Socket:
    """A connected dealer. `before` is called with a socket that shows a key, before it connects."""
    socket_file(endpoint)
    endpoint = require_keys(endpoint, keys)
    made = context.socket(zmq.DEALER)
    _set_options(made, max_message_bytes)
    made.set(zmq.IDENTITY, identity.encode())
    try:
        if keys is not None and is_tcp(endpoint):
            show_key(made, keys)
            before(made)
        made.connect(endpoint)
    except UserError:
        context.destroy(linger=0)
        raise
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise _endpoint_error(endpoint, error) from None
    return made


@cache
def _keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of frames instead of returning it to the system.

    A frame is larger than the size from which malloc returns memory at once (128 kB by default), so each frame would
    cost a system call, and a page fault for each of its 4 kB, on both ends: as much as everything else together.
    Freeing one larger block raises that threshold to its size for the whole process (mallopt(3), M_MMAP_THRESHOLD).
    The block itself is never touched, so it takes no memory.
    """
    bytes(_KEPT_BYTES)


@cache
def _raise_file_limit() -> None:
    """Let this process open as many files as it may: each peer of a listening socket is one, a generator two, and many
    systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # no more than some systems allow
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _set_options(made: zmq.Socket, max_message_bytes: int) -> None:
    _keep_freed_memory()
    # high enough that a burst of acknowledgements is never lost or blocked; permits bound what is under way
    made.set(zmq.SNDHWM, QUEUED_MESSAGES)
    made.set(zmq.RCVHWM, QUEUED_MESSAGES)
    made.set(zmq.MAXMSGSIZE, max_message_bytes)
    made.set(zmq.RECONNECT_IVL, 20)
    made.set(zmq.RECONNECT_IVL_MAX, 500)
    made.set(zmq.TCP_KEEPALIVE, 1)  # finds out that a host is gone
    made.set(zmq.TCP_KEEPALIVE_IDLE, 30)
    made.set(zmq.TCP_KEEPALIVE_INTVL, 10)
    made.set(zmq.TCP_KEEPALIVE_CNT, 6)
    made.copy_threshold = _LARGE_FRAME_BYTES


def _within(frames: list[Blob], message: Message, max_bytes: int) -> list[Blob]:
    """The frames, if the receiver takes so much; it would cut the connection without a message. Raises UserError."""
    size = sum(map(len, frames))
    if size > max_bytes:
        raise UserError(
            f"wire.max_message_mb is {max_bytes >> 20}, but {_describe(message)} takes {size / 2**20:.1f} MB; raise "
            "it (about 8 bytes a token), or lower generator.max_context"
        )
    return frames


def _describe(message: Message) -> str:
    kind = type(message).__name__
    trajectories = getattr(message, "trajectories", ())
    if not trajectories:
        return f"a message '{kind}'"
    t = max(trajectories, key=lambda one: len(one.tokens))
    return f"a message '{kind}' with the trajectory of group {t.group}, sample {t.sample} ({len(t.tokens)} tokens)"


def _send(made: zmq.Socket, frames: list[Blob]) -> None:
    made.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)


def _buffers(frames: list[zmq.Frame]) -> list[Blob]:
    """Small frames as bytes (a view would keep the socket's whole receive buffer), others as views."""
    return [frame.bytes if len(frame) < 4096 else frame.buffer for frame in frames]


def _waited(who: str, seconds: float, waiting_for: str) -> str:
    return f"{who} waited {seconds:g} s for {waiting_for}"


def _remove_stale(path: Path, endpoint: str) -> None:
    """Remove the socket file of a dead process; ZeroMQ alone would remove that of a live one, too."""
    if not path.exists():
        return
    if not path.is_socket():
        raise UserError(f"wire.endpoint: {path} exists and is no socket; name another path or remove the file")
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        raise UserError(
            f"wire.endpoint: {endpoint} is in use by another process; end that run or choose another endpoint"
        )
    path.unlink(missing_ok=True)


def _endpoint_error(endpoint: str, error: zmq.ZMQError) -> UserError:
    remedy = {
        zmq.EADDRINUSE: "it is in use; end the other run or choose another port (tcp://127.0.0.1:* finds one)",
        zmq.EADDRNOTAVAIL: "this machine has no such address; use one of its own, such as 127.0.0.1",
        errno.ENODEV: "this machine has no such address; use one of its own, such as 127.0.0.1",
        zmq.EINVAL: "it must look like ipc://PATH or tcp://HOST:PORT",
        zmq.EPROTONOSUPPORT: "it must look like ipc://PATH or tcp://HOST:PORT",
    }.get(error.errno or 0, f"{os.strerror(error.errno or 0)}; does its folder exist, and may this user write there?")
    return UserError(f"wire.endpoint: cannot use {endpoint}: {remedy}")
