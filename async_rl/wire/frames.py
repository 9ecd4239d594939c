"""A message <-> frames.

Frame 0 is msgpack `[schema, kind, {field: value}]`. Trajectories follow as blobs (trajectory/codec.py)
joined into frames of some 256 kB; frame 0 says how long each is. `decode` answers a complete, typed
message or raises `WireError`, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgpack

from async_rl.trajectory.codec import Blob, WireError, WireKind, pack, plain, unpack
from async_rl.trajectory.types import Split, Trajectory
from async_rl.wire.messages import Batch, Detail, Finished, Message, Permit, Permits, Turns

# -------------------- refusal
# Why a message is not taken: a closed list, so that what strangers send cannot grow the counters.

Impossible = Literal[
    "direction",
    "role",
    "stranger",
    "second",
    "crowd",
    "number",
    "step",
    "version",
    "group",
    "permit",
    "tokens",
    "name",
    "unlike",
]
"""What is wrong with a message that was well formed: of a kind that the receiver does not take; a role that does
not exist; from a peer that has no business with it; a second trainer beside the first; more peers or evaluations
than are held; a number that cannot be; a batch that cannot be asked for yet; weights that cannot exist; a group
that was not given to this peer; a trajectory that is not the one permitted (sample, problem, split, seed,
temperature); tokens outside the vocabulary; a joining generator under a name that is another's, or with another
version of this program."""
RefusalKind = WireKind | Impossible

REFUSALS: frozenset[str] = frozenset((*get_args(WireKind), *get_args(Impossible)))
HARMLESS: frozenset[str] = frozenset({"group", "stranger", "crowd"})
"""What may befall a sound generator: its group went to another while it was not heard of, or the buffer has
forgotten it. Any other refusal tells it that it is broken itself."""


# -------------------- readers
# Checked values out of unpacked msgpack: `READERS[kind](value, kind)` is a message, or raises `WireError`.
#
# The readers are made once, from the annotations in wire/messages.py, so that a message is declared in one
# place only.

_DEEPEST = 8
_Reader = Callable[[Any, str], Any]


def _reader(hint: Any) -> _Reader:
    arguments = get_args(hint)
    if hint in (int, float, str, bool):
        return _exactly(hint)
    if hint == Blob:
        return _exactly(bytes)
    if hint == Split:
        return _split
    if hint == Detail:
        return _detail
    if hint == Mapping[str, float]:
        return _named_floats
    if get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        # decode() has already made the trajectories out of their frames
        return _as_it_is if arguments[0] is Trajectory else _many(_reader(arguments[0]))
    if get_origin(hint) is tuple:
        return _row(arguments)
    return _fields_of(hint)


def _exactly(kind: type) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not kind:
            raise WireError(f"{where} is a {type(value).__name__}, not a {kind.__name__}", "fields")
        return value

    return read


def _split(value: Any, where: str) -> Any:
    if type(value) is not str or value not in get_args(Split):
        raise WireError(f"{where} is not one of {get_args(Split)}", "fields")
    return value


def _as_it_is(value: Any, where: str) -> Any:
    return value


def _many(read_one: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise WireError(f"{where} is a {type(value).__name__}, not a list", "fields")
        return tuple([read_one(item, where) for item in value])

    return read


def _row(kinds: tuple[type, ...]) -> _Reader:
    expected = list(kinds)
    assert set(expected) <= {int, float, str, bool}

    def read(value: Any, where: str) -> Any:
        if type(value) is not list or [*map(type, value)] != expected:
            names = ", ".join(kind.__name__ for kind in expected)
            raise WireError(f"{where} is not a list of {len(expected)}: {names}", "fields")
        return tuple(value)

    return read


def _named_floats(value: Any, where: str) -> Any:
    if type(value) is not dict or any(type(k) is not str or type(v) is not float for k, v in value.items()):
        raise WireError(f"{where} is not a table of names and numbers", "fields")
    return value


def _detail(value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise WireError(f"{where} is a {type(value).__name__}, not a table", "fields")
    _refuse_unless_plain(value, where, depth=0)
    return value


def _refuse_unless_plain(value: Any, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise WireError(f"{where} is nested deeper than {_DEEPEST}", "fields")
    if type(value) is dict:
        if any(type(name) is not str for name in value):
            raise WireError(f"{where} has a key that is no string", "fields")
        value = list(value.values())
    if type(value) is list:
        for item in value:
            _refuse_unless_plain(item, where, depth + 1)
    elif value is not None and type(value) not in (int, float, str, bool):
        raise WireError(f"{where} holds a {type(value).__name__}", "fields")


def _fields_of(cls: type) -> _Reader:
    hints = get_type_hints(cls)
    readers = {name: _reader(hints[name]) for name in wire_fields(cls)}

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            raise WireError(f"{where} with missing or extra fields; it has {sorted(readers)}", "fields")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in value.items()})

    return read


def wire_fields(cls: type) -> list[str]:
    """Names of the fields that are sent under their own name."""
    return [f.name for f in fields(cls) if f.name != "blobs"]


READERS: dict[str, _Reader] = {cls.__name__: _fields_of(cls) for cls in get_args(Message)}


SCHEMA = 1
_MOST_HEADER_BYTES = 4 << 20
"""of frame 0; the largest is the evidence of a model with some ten thousand tensors"""
_MOST_FRAMES = 1 << 16
PORTION_BYTES = 256 << 10
"""of trajectories that leave in one message, where there are several"""
_FRAME_BYTES = 256 * 1024
"""blobs are joined until a frame is this long: few frames cost less, and all of them cost a copy once"""


def encode(message: Message) -> list[Blob]:
    """The frames of a message. Raises ValueError when it cannot be sent (a number beyond 64 bits,
    something in a detail that is not plain data)."""
    frames: list[Blob] = [b""]
    match message:
        case Finished(trajectories=trajectories) | Turns(trajectories=trajectories):
            values: Any = {"trajectories": _join(map(pack, trajectories), frames)}
        case Batch():
            values = {
                "step": message.step,
                "trajectories": _join([*map(pack, message.trajectories), *message.blobs], frames),
                "after": message.after,
                "total": message.total,
                "detail": {name: float(value) for name, value in message.detail.items()},
            }
        case Permits(permits=permits):
            values = {**_values(message), "permits": [_values(permit) for permit in permits]}
        case _:
            values = _values(message)
    try:
        frames[0] = msgpack.packb([SCHEMA, type(message).__name__, values], unicode_errors="replace")
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(message).__name__} cannot be sent: {error}") from None
    return frames


def portions(trajectories: Iterable[Trajectory]) -> Iterator[tuple[Trajectory, ...]]:
    """In order, so many at a time that a message stays small; one that is larger goes alone."""
    portion: list[Trajectory] = []
    size = 0
    for trajectory in trajectories:
        more = trajectory.tokens.nbytes + trajectory.log_behaviour.nbytes
        if portion and size + more > PORTION_BYTES:
            yield tuple(portion)
            portion, size = [], 0
        portion.append(trajectory)
        size += more
    if portion:
        yield tuple(portion)


def decode(frames: Sequence[Blob]) -> Message:
    """The message of these frames. Raises WireError."""
    if not frames:
        raise WireError("a message without frames", "message")
    if len(frames) > _MOST_FRAMES:
        raise WireError(f"a message of {len(frames)} frames; no more than {_MOST_FRAMES} are taken", "size")
    header = plain(frames[0], _MOST_HEADER_BYTES)
    if type(header) is not list or len(header) != 3 or type(header[1]) is not str:
        raise WireError("not a message of ours", "message")
    schema, kind, values = header
    if type(schema) is not int or schema != SCHEMA:
        said = schema if type(schema) in (int, bool) else type(schema).__name__
        raise WireError(f"a message of schema {said}; this program speaks {SCHEMA}", "schema")
    read = READERS.get(kind)
    if read is None:
        raise WireError(f"a message of unknown kind {kind[:40]!r}", "message")
    if kind not in ("Finished", "Turns", "Batch"):
        if len(frames) != 1:
            raise WireError(f"{kind} with {len(frames)} frames", "frames")
        return read(values, kind)
    if type(values) is not dict or "trajectories" not in values:
        raise WireError(f"{kind} without trajectories", "fields")
    blobs = tuple(_views(values["trajectories"], frames, kind))
    values["trajectories"] = tuple(map(unpack, blobs))
    message = read(values, kind)
    return replace(message, blobs=blobs) if kind == "Finished" else message


def _join(blobs: Iterable[Blob], frames: list[Blob]) -> list[list[int]]:
    """Append the blobs, joined, to `frames`; the lengths of those in each frame."""
    layout: list[list[int]] = []
    lengths: list[int] = []
    joined: list[Blob] = []
    size = 0
    for blob in blobs:
        joined.append(blob)
        lengths.append(len(blob))
        size += len(blob)
        if size >= _FRAME_BYTES:
            layout.append(lengths)
            frames.append(b"".join(joined))
            lengths, joined, size = [], [], 0
    if lengths:
        layout.append(lengths)
        frames.append(b"".join(joined))
    return layout


def _views(layout: Any, frames: Sequence[Blob], kind: str) -> Iterator[Blob]:
    """The blobs of the frames after the first, as views."""
    if type(layout) is not list or len(layout) != len(frames) - 1:
        raise WireError(f"{kind} with {len(frames)} frames, not what its header says", "frames")
    for lengths, frame in zip(layout, frames[1:], strict=True):
        if type(lengths) is not list or any(type(n) is not int or n < 0 for n in lengths):
            raise WireError(f"{kind} with a frame layout that is no list of lengths", "frames")
        if sum(lengths) != len(frame):
            raise WireError(f"{kind} with a frame of {len(frame)} bytes instead of {sum(lengths)}", "frames")
        view, start = memoryview(frame), 0
        for length in lengths:
            yield view[start : start + length]
            start += length


def _values(message: Any) -> dict[str, Any]:
    """Field by field; a whole number in a float field becomes a float, as its type says."""
    return {
        name: float(getattr(message, name)) if is_float else getattr(message, name)
        for name, is_float in _FLOATS[type(message)]
    }


_FLOATS: dict[type, list[tuple[str, bool]]] = {
    cls: [(name, get_type_hints(cls)[name] is float) for name in wire_fields(cls)]
    for cls in (*get_args(Message), Permit)
}
