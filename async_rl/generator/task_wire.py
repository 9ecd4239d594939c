"""What a generator and its processes of the task say to each other, and the socket that carries it.

A frame is a length (4 bytes) and one msgpack document. Data only: nothing that is received is executed.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec


class FarError(Exception):
    """An episode failed in its process; the text says what was raised there, and where."""


LENGTH = struct.Struct("<I")
READ_BYTES = 1 << 16


class Frame(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Anything that is sent."""


class Made(Frame, frozen=True, kw_only=True):
    """To a new process: make this task."""

    name: str
    args: Mapping[str, Any]


class Ready(Frame, frozen=True, kw_only=True):
    """Its answer: episodes may come, or why none can."""

    error: str = ""


class Begin(Frame, frozen=True, kw_only=True):
    """To a process: run an episode."""

    episode: int
    split: str
    problem: int
    """its index"""
    seed: int
    """of the session"""
    template: str


class Cancel(Frame, frozen=True, kw_only=True):
    """To a process: the episode is not wanted any more. It answers with `Ended` all the same."""

    episode: int


class Call(Frame, frozen=True, kw_only=True):
    """From a process: its episode calls the session."""

    episode: int
    number: int
    """of this call within the process"""
    method: str
    """or property, of `task.Session`"""
    args: Sequence[Any] = ()
    named: Mapping[str, Any] = {}


class Answer(Frame, frozen=True, kw_only=True):
    """What the session answered, or raised."""

    number: int
    value: Any = None
    raised: str = ""
    """name of the exception's class; empty: none"""
    text: str = ""
    """of the exception"""


class Ended(Frame, frozen=True, kw_only=True):
    """From a process: an episode has come to its end."""

    episode: int
    reward: float | Mapping[str, float | None] | None = None
    raised: str = ""
    """name of the session's exception with which it ended, or `other`; empty: it has a reward"""
    text: str = ""
    """what it raised, and where"""
    teardown_error: str = ""


FRAMES = Made | Ready | Begin | Cancel | Call | Answer | Ended
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FRAMES)


def written(frame: Frame) -> bytes:
    """The bytes of a frame. Raises TypeError for a value that is no plain data."""
    body = _ENCODER.encode(frame)
    return LENGTH.pack(len(body)) + body


@dataclass(slots=True)
class Frames:
    """Frames out of a stream of bytes."""

    kept: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[FRAMES]:
        """The frames that are whole with these bytes."""
        self.kept += data
        while len(self.kept) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self.kept)
            end = LENGTH.size + size
            if len(self.kept) < end:
                return
            frame = _DECODER.decode(bytes(self.kept[LENGTH.size : end]))
            del self.kept[:end]
            yield frame


def receive(link: socket.socket, frames: Frames, flags: int = 0) -> list[FRAMES]:
    """Wait for bytes; the frames that they complete. Raises EOFError when the other side is gone."""
    data = link.recv(READ_BYTES, flags)
    if not data:
        raise EOFError
    return list(frames.feed(data))
