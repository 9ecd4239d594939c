"""Checked values out of unpacked msgpack: `READERS[kind](value, kind)` is a message, or raises `WireError`.

The readers are made once, from the annotations in wire/messages.py, so that a message is declared in one
place only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from async_rl.trajectory.codec import Blob, WireError
from async_rl.trajectory.types import Split, Trajectory
from async_rl.wire.messages import Detail, Message

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
