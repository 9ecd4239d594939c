"""A message <-> frames.

Frame 0 is msgpack `[schema, kind, {field: value}]`. Trajectories follow as blobs (trajectory/codec.py) joined into
frames of some 256 kB; frame 0 says how long each blob is. What several of a group begin with alike is in the message
once (trajectory/beginnings.py). `decode` returns a complete, typed message or raises
`WireError`, whatever the bytes are: msgspec checks every field against its annotation in wire/messages.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgpack
import msgspec

from async_rl.trajectory.beginnings import cut_all, join_all
from async_rl.trajectory.codec import Blob, WireError, WireKind, pack, plain, unpack
from async_rl.trajectory.types import Trajectory
from async_rl.wire.messages import Batch, Detail, Finished, Message, Turns, Verify

SCHEMA = 1
PORTION_BYTES = 256 << 10
"""trajectories that leave in one message, where there are several"""
_FRAME_BYTES = 256 << 10
"""blobs are joined until a frame is this long: few frames cost less, and all of them cost a copy once"""
_BATCH_FRAME_BYTES = 1 << 20
"""of a batch: frames of this length leave without a copy (channel.py)"""
_MOST_WHOLE_BYTES = 16 << 20
"""of the trajectories of a message in which some are cut, put together again: more than a generator sends at once"""
_MOST_BATCH_BYTES = 1 << 30
"""likewise, of a batch"""
_MOST_HEADER_BYTES = 4 << 20
"""of frame 0; the largest is the evidence of a model with some ten thousand tensors"""
_MOST_FRAMES = 1 << 16
_DEEPEST = 8
"""nested lists and tables in a Detail"""

_KINDS: dict[str, type] = {cls.__name__: cls for cls in get_args(Message)}
_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(name for name in cls.__struct_fields__ if name != "blobs") for cls in get_args(Message)
}
"""names of the fields that are sent under their own name"""
_DETAILS: dict[type, tuple[str, ...]] = {
    cls: tuple(name for name, hint in get_type_hints(cls).items() if hint == Detail) for cls in get_args(Message)
}
"""of them, those that hold plain data of any shape"""
_CARRYING = (Finished, Turns, Batch, Verify)
_MISMATCH = re.compile(r"Expected `(\w+)`.*, got `?(\w+)`? - at `\$\.(\w+)(.*)`")
"""what msgspec says of a value of the wrong type"""


def encode(message: Message) -> list[Blob]:
    """The frames of a message. Raises ValueError when it cannot be sent (a number beyond 64 bits, something in a
    detail that is not plain data)."""
    frames: list[Blob] = [b""]
    kind = type(message)
    values: dict[str, Any] = {name: getattr(message, name) for name in _FIELDS[kind]}
    match message:
        case Finished(trajectories=trajectories) | Turns(trajectories=trajectories) | Verify(trajectories=trajectories):
            values["trajectories"] = _join(_packed(trajectories, _MOST_WHOLE_BYTES), frames)
        case Batch(trajectories=trajectories, blobs=blobs):
            values["trajectories"] = _join(
                [*_packed(trajectories, _MOST_BATCH_BYTES), *blobs], frames, _BATCH_FRAME_BYTES
            )
    try:
        frames[0] = msgpack.packb(
            [SCHEMA, kind.__name__, values], default=msgspec.structs.asdict, unicode_errors="replace"
        )
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{kind.__name__} cannot be sent: {error}") from None
    return frames


def decode(frames: Sequence[Blob]) -> Message:
    """The message of these frames. Raises WireError."""
    if not frames:
        raise WireError("a message without frames", "message")
    if len(frames) > _MOST_FRAMES:
        raise WireError(f"a message of {len(frames)} frames; no more than {_MOST_FRAMES} are taken", "size")
    header = plain(frames[0], _MOST_HEADER_BYTES)
    if type(header) is not list or len(header) != 3 or type(header[1]) is not str:
        raise WireError("not a message of ours", "message")
    schema, name, values = header
    if type(schema) is not int or schema != SCHEMA:
        said = schema if type(schema) in (int, bool) else type(schema).__name__
        raise WireError(f"a message of schema {said}; this program speaks {SCHEMA}", "schema")
    kind = _KINDS.get(name)
    if kind is None:
        raise WireError(f"a message of unknown kind {name[:40]!r}", "message")
    if kind not in _CARRYING:
        if len(frames) != 1:
            raise WireError(f"{name} with {len(frames)} frames", "frames")
        return _checked(values, kind)
    if type(values) is not dict or "trajectories" not in values:
        raise WireError(f"{name} without trajectories", "fields")
    most = _MOST_BATCH_BYTES if kind is Batch else _MOST_WHOLE_BYTES
    views = list(_views(values["trajectories"], frames, name))
    blobs: tuple[memoryview, ...] = tuple([memoryview(blob) for blob in join_all(views, most)])
    values["trajectories"] = tuple(map(unpack, blobs))
    message = _checked(values, kind)
    return msgspec.structs.replace(message, blobs=blobs) if isinstance(message, Finished) else message


def portions(trajectories: Iterable[Trajectory]) -> Iterator[tuple[Trajectory, ...]]:
    """The trajectories in order, as many at a time as keep a message small; one that is larger goes alone."""
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


# ---------------------------------------------------------------- blobs in frames


def _packed(trajectories: Sequence[Trajectory], most_bytes: int) -> list[Blob]:
    return cut_all(trajectories, map(pack, trajectories), most_bytes)


def _join(blobs: Iterable[Blob], frames: list[Blob], frame_bytes: int = _FRAME_BYTES) -> list[list[int]]:
    """Append the blobs, joined, to `frames`; returns the lengths of those in each frame."""
    layout: list[list[int]] = []
    lengths: list[int] = []
    joined: list[Blob] = []
    size = 0
    for blob in blobs:
        joined.append(blob)
        lengths.append(len(blob))
        size += len(blob)
        if size >= frame_bytes:
            layout.append(lengths)
            frames.append(b"".join(joined))
            lengths, joined, size = [], [], 0
    if lengths:
        layout.append(lengths)
        frames.append(b"".join(joined))
    return layout


def _views(layout: Any, frames: Sequence[Blob], kind: str) -> Iterator[memoryview]:
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


# ---------------------------------------------------------------- check of what arrives


def _checked(values: Any, kind: type[Message]) -> Message:
    """The message with these field values. Raises WireError unless each field is there and of its type."""
    names = _FIELDS[kind]
    if type(values) is not dict or values.keys() != set(names):
        raise WireError(f"{kind.__name__} with missing or extra fields; it has {sorted(names)}", "fields")
    for name in _DETAILS[kind]:
        _refuse_unless_plain(values[name], f"{kind.__name__}.{name}", depth=0)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise WireError(_mismatch(str(error), kind), "fields") from None


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


def _mismatch(said: str, kind: type) -> str:
    """msgspec's words as ours. Example: `Want.limit is a float, not a int`."""
    found = _MISMATCH.fullmatch(said)
    if found is None:
        return f"{kind.__name__}: {said[:200]}"
    wanted, got, name, inside = found.groups()
    row = get_args(get_type_hints(kind)[name])[:1]
    if inside and get_origin(row[0] if row else None) is tuple:
        types = [one.__name__ for one in get_args(row[0])]
        return f"{kind.__name__}.{name}{inside} is not a list of {len(types)}: {', '.join(types)}"
    words = {"array": "list", "object": "table"}
    return f"{kind.__name__}.{name}{inside} is a {words.get(got, got)}, not a {words.get(wanted, wanted)}"


# ---------------------------------------------------------------- kinds of refusal

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
    "quarantine",
]
"""What is wrong with a message that was well formed: of a kind that the receiver does not take; a role that does
not exist; from a peer that has no business with it; a second trainer beside the first; more peers or evaluations
than are held; a number that cannot be; a batch that cannot be asked for yet; weights that cannot exist; a group
that was not given to this peer; a trajectory that is not the one permitted (sample, problem, split, seed,
temperature); tokens outside the vocabulary; a joining generator under a name that is another's, or with another
version of this program; from a generator that reported what it did not do."""
RefusalKind = WireKind | Impossible
"""A closed list, so that what strangers send cannot grow the counters."""

REFUSALS: frozenset[str] = frozenset((*get_args(WireKind), *get_args(Impossible)))
HARMLESS: frozenset[str] = frozenset({"group", "stranger", "crowd"})
"""What may happen to a sound generator: its group went to another while nothing was received from it, or the buffer
has forgotten it. Any other refusal tells a generator that it is broken itself."""
