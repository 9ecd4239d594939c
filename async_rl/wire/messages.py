"""Every message that crosses a process, and its frames.

Frame 0 is msgpack `[schema, kind, {field: value}]`. Trajectories follow as blobs (trajectory/codec.py)
joined into frames of some 100 kB, which the socket takes without a copy; frame 0 says how long each is.
`decode` answers a complete, typed message or raises `WireError`, whatever the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

import msgpack

from async_rl.trajectory.codec import Blob, WireError, pack_parts, plain, unpack
from async_rl.trajectory.types import Split, Trajectory

SCHEMA = 1
_FRAME_BYTES = 256 * 1024
"""blobs are joined until a frame is this long"""
_DEEPEST = 8
HOLDS = "holds/"
"""in the detail of a batch: this and a connected generator's name -> version it holds"""
Detail = Mapping[str, Any]
"""plain data: strings, numbers, booleans, None, and lists and dicts (with string keys) of these"""


# ---- generator -> buffer ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of every generator and of the trainer."""

    role: str
    name: str
    pid: int
    detail: Detail = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    limit: int
    """permits it takes in all since its Hello: repeating the message asks for nothing more"""
    version: int
    """weights it holds; -1: none yet"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Answered by `Accepted`, or `Refused`; until then the generator keeps and repeats it."""

    trajectories: tuple[Trajectory, ...]
    """each has passed `Trajectory.check()`, else the whole message is refused"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    version: int
    """weights that sample the next token"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Counters since the generator began."""

    name: str
    version: int
    busy_seconds: float
    """inside model steps"""
    wall_seconds: float
    tokens_generated: int
    running: int
    """sequences being decoded now"""
    waiting: int
    """sequences not yet started"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """What a generator shows of the weights it has just loaded. The buffer passes it on to the trainer."""

    name: str
    """of the generator, as the buffer knows it"""
    version: int
    digests: tuple[tuple[str, int], ...]
    """(tensor, checksum of elements sampled from it), 64 bits unsigned"""
    log_probs: tuple[float, ...]
    """of the probe under these weights, nats"""


# ---- buffer -> generator ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """The right to generate one group."""

    group: int
    problem: int
    split: Split
    samples: tuple[int, ...]
    """indices within the group that are still to be generated"""
    seed: int
    """of the group, 64 bits unsigned"""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Permits:
    permits: tuple[Permit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    pairs: tuple[tuple[int, int], ...]
    """(group, sample) of every trajectory that is now in the store, those it had before included"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The message was not taken and need not be sent again."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeights:
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """To every process: end now."""

    reason: str


# ---- trainer -> buffer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBatch:
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """The checkpoint of this version is on the disk: its training steps are not done again."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    evaluation: int
    """its number; asking twice is the same as asking once"""
    version: int
    """oldest weights that may be used"""
    problems: tuple[int, ...]
    """indices into the eval split"""
    samples: int
    """per problem"""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchEvaluation:
    evaluation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The trainer has finished its last step (reason empty) or could not go on (the cause)."""

    reason: str = ""


# ---- buffer -> trainer --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    step: int
    trajectories: tuple[Trajectory, ...] = ()
    """group by group"""
    blobs: tuple[Blob, ...] = ()
    """stored blobs, sent as they are after `trajectories`; the receiver finds them in `trajectories`"""
    detail: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What was asked for is not there yet; it will come without being asked for again."""

    what: str
    reason: str
    """who is waited for"""
    seconds: float
    """for how long already"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    evaluation: int
    finished: bool
    rewards: tuple[float, ...] = ()
    version_min: int = -1
    """oldest weights that sampled a token of it; -1: no token yet"""
    version_max: int = -1
    detail: Detail = field(default_factory=dict)


# ---- launcher -> buffer -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Answered by `Snapshot`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    detail: Detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """To the buffer: pass on `Stop`, commit, end."""

    reason: str


# fmt: off
Message = (
    Hello | Want | Finished | Holds | Status | Canary
    | Permits | Accepted | Refused | NewWeights | Stop
    | NextBatch | Published | Checkpointed | Evaluate | FetchEvaluation | Done
    | Batch | Waiting | EvaluationResult
    | Query | Snapshot | Shutdown
)
# fmt: on


def encode(message: Message) -> list[Blob]:
    """The frames of a message. Raises ValueError when it cannot be sent (a number beyond 64 bits,
    something in a detail that is not plain data)."""
    frames: list[Blob] = [b""]
    match message:
        case Finished(trajectories=trajectories):
            values: Any = {"trajectories": _frame((pack_parts(t) for t in trajectories), frames)}
        case Batch():
            blobs: list[Sequence[Blob]] = [
                *(pack_parts(t) for t in message.trajectories),
                *([blob] for blob in message.blobs),
            ]
            values = {
                "step": message.step,
                "trajectories": _frame(blobs, frames),
                "detail": {name: float(value) for name, value in message.detail.items()},
            }
        case Permits(permits=permits):
            values = {"permits": [_values(permit) for permit in permits]}
        case _:
            values = _values(message)
    try:
        frames[0] = msgpack.packb([SCHEMA, type(message).__name__, values], unicode_errors="replace")
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(message).__name__} cannot be sent: {error}") from None
    return frames


def decode(frames: Sequence[Blob]) -> Message:
    """The message of these frames. Raises WireError."""
    if not frames:
        raise WireError("a message without frames")
    header = plain(frames[0])
    if type(header) is not list or len(header) != 3 or type(header[1]) is not str:
        raise WireError("not a message of ours")
    schema, kind, values = header
    if type(schema) is not int or schema != SCHEMA:
        raise WireError(f"a message of schema {schema!r}; this program speaks {SCHEMA}")
    if kind not in _KINDS:
        raise WireError(f"a message of unknown kind {kind[:40]!r}")
    if kind not in ("Finished", "Batch"):
        if len(frames) != 1:
            raise WireError(f"{kind} with {len(frames)} frames")
        return _KINDS[kind](values, kind)
    if type(values) is not dict or "trajectories" not in values:
        raise WireError(f"{kind} without trajectories")
    values["trajectories"] = tuple(unpack(blob) for blob in _unframe(values["trajectories"], frames, kind))
    return _KINDS[kind](values, kind)


def _frame(blobs: Iterable[Sequence[Blob]], frames: list[Blob]) -> list[list[int]]:
    """Join the blobs, each given in parts, into `frames`; the lengths of those in each frame."""
    layout: list[list[int]] = []
    lengths: list[int] = []
    joined: list[Blob] = []
    size = 0
    for parts in blobs:
        lengths.append(sum([len(part) for part in parts]))
        joined += parts
        size += lengths[-1]
        if size >= _FRAME_BYTES:
            layout.append(lengths)
            frames.append(b"".join(joined))
            lengths, joined, size = [], [], 0
    if lengths:
        layout.append(lengths)
        frames.append(b"".join(joined))
    return layout


def _unframe(layout: Any, frames: Sequence[Blob], kind: str) -> Iterable[Blob]:
    if type(layout) is not list or len(layout) != len(frames) - 1:
        raise WireError(f"{kind} with {len(frames)} frames, not what its header says")
    for lengths, frame in zip(layout, frames[1:], strict=True):
        if type(lengths) is not list or any(type(n) is not int or n < 0 for n in lengths):
            raise WireError(f"{kind} with a frame layout that is no list of lengths")
        if sum(lengths) != len(frame):
            raise WireError(f"{kind} with a frame of {len(frame)} bytes instead of {sum(lengths)}")
        if len(lengths) == 1:
            yield frame
            continue
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


# A reader makes a checked value of one type out of unpacked msgpack. The readers are made once, from
# the annotations above, so that a message is declared in one place only.
_Reader = Callable[[Any, str], Any]


def _reader(hint: Any) -> _Reader:
    arguments = get_args(hint)
    if hint in (int, float, str, bool):
        return _exactly(hint)
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
        return _each([_reader(argument) for argument in arguments])
    return _fields_of(hint)


def _exactly(kind: type) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not kind:
            raise WireError(f"{where} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    return read


def _split(value: Any, where: str) -> Any:
    if value not in get_args(Split):
        raise WireError(f"{where} is {value!r}, not one of {get_args(Split)}")
    return value


def _as_it_is(value: Any, where: str) -> Any:
    return value


def _many(read_one: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise WireError(f"{where} is a {type(value).__name__}, not a list")
        return tuple([read_one(item, where) for item in value])

    return read


def _each(readers: list[_Reader]) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not list or len(value) != len(readers):
            raise WireError(f"{where} is not a list of {len(readers)}")
        return tuple([read_one(item, where) for read_one, item in zip(readers, value, strict=True)])

    return read


def _named_floats(value: Any, where: str) -> Any:
    if type(value) is not dict or any(type(k) is not str or type(v) is not float for k, v in value.items()):
        raise WireError(f"{where} is not a table of names and numbers")
    return value


def _detail(value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise WireError(f"{where} is a {type(value).__name__}, not a table")
    _refuse_unless_plain(value, where, depth=0)
    return value


def _refuse_unless_plain(value: Any, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise WireError(f"{where} is nested deeper than {_DEEPEST}")
    if type(value) is dict:
        if any(type(name) is not str for name in value):
            raise WireError(f"{where} has a key that is no string")
        value = list(value.values())
    if type(value) is list:
        for item in value:
            _refuse_unless_plain(item, where, depth + 1)
    elif value is not None and type(value) not in (int, float, str, bool):
        raise WireError(f"{where} holds a {type(value).__name__}")


def _fields_of(cls: type) -> _Reader:
    hints = get_type_hints(cls)
    readers = {name: _reader(hints[name]) for name in _wire_fields(cls)}

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            raise WireError(f"{where} with missing or extra fields; it has {sorted(readers)}")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in value.items()})

    return read


def _wire_fields(cls: type) -> list[str]:
    return [f.name for f in fields(cls) if f.name != "blobs"]


_KINDS: dict[str, _Reader] = {cls.__name__: _fields_of(cls) for cls in get_args(Message)}
_FLOATS: dict[type, list[tuple[str, bool]]] = {
    cls: [(name, get_type_hints(cls)[name] is float) for name in _wire_fields(cls)]
    for cls in (*get_args(Message), Permit)
}
