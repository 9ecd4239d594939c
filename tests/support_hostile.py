"""Bytes and messages of an attacker: valid ones bent, random ones, and well-formed ones that cannot be."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from random import Random
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
from msgspec.structs import replace

from async_rl.trajectory import Split, Trajectory, Turn, VersionSpan
from async_rl.wire import messages as msg
from async_rl.wire.frames import SCHEMA, encode

KINDS: tuple[type, ...] = get_args(msg.Message)
WITH_TRAJECTORIES = (msg.Finished, msg.Turns, msg.Batch, msg.Verify)
INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    100,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**31),
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 0.5)
TEXTS = (
    "",
    "generator",
    "trainer",
    "train",
    "eval",
    "x" * 300,
    "\x00",
    "\N{PILE OF POO}",
    "../..",
    "'; DROP TABLE groups",
)
MARKERS = bytes(
    (
        0xC0,
        0xC1,
        0xC4,
        0xC6,
        0xC7,
        0xC9,
        0xCA,
        0xCB,
        0xCF,
        0xD3,
        0xD4,
        0xD6,
        0xDB,
        0xDC,
        0xDD,
        0xDE,
        0xDF,
        0x90,
        0x80,
        0xFF,
    )
)


def some_trajectory(random: Random, **changes: Any) -> Trajectory:
    """Passes `check()`; about any group."""
    tokens = random.randrange(1, 12)
    start = random.randrange(tokens)
    cut = random.randint(start, tokens)
    log_behaviour = np.zeros(tokens, np.float32)
    log_behaviour[start:] = -0.25
    older, newer = sorted((random.choice((0, 0, 1, 2, 3, 2**31 - 1)), random.choice((0, 1, 2, 3))))
    spans = (VersionSpan(version=older, start=start, end=cut), VersionSpan(version=newer, start=cut, end=tokens))
    values: dict[str, Any] = {
        "group": random.choice((0, 1, random.randrange(200), 2**62)),
        "sample": random.choice((0, 1, 2, 2**31)),
        "problem": random.choice((0, 1, random.randrange(200))),
        "split": random.choice(get_args(Split)),
        "seed": random.choice((0, random.getrandbits(64))),
        "tokens": np.array([random.choice((0, 5, 99, 100, 2**31 - 1)) for _ in range(tokens)], np.int32),
        "log_behaviour": log_behaviour,
        "turns": (Turn(start=start, length=tokens - start, reward=random.choice((0.0, 1.5))),),
        "versions": spans,
        "reward": random.choice((0.0, 1.0, -1e300)),
        "ended": random.choice(("finished", "error", "aborted", "length")),
        "temperature": random.choice((1.0, 0.0, math.nan)),
        "reason": random.choice(TEXTS),
        "info": random.choice(({}, {"a": 1.0, "b": "c"})),
    }
    return Trajectory(**{**values, **changes})


def some_value(random: Random, hint: Any) -> Any:
    """Anything a field of this type may hold."""
    arguments = get_args(hint)
    if hint is int:
        return random.choice(INTEGERS)
    if hint is float:
        return random.choice(FLOATS)
    if hint is str:
        return random.choice(TEXTS)
    if hint is bool:
        return random.random() < 0.5
    if hint == Split:
        return random.choice(arguments)
    if hint in (memoryview, bytes):
        return random.randbytes(random.randrange(30))
    if get_origin(hint) is UnionType:
        return some_value(random, random.choice(arguments))
    if hint is NoneType:
        return None
    if isinstance(hint, type) and issubclass(hint, msg.WireStruct):
        return some_message(random, hint)
    if get_origin(hint) is Mapping and arguments[1] is not Any:
        return {random.choice(TEXTS): some_value(random, arguments[1]) for _ in range(random.randrange(3))}
    if hint == msg.Detail:
        return {random.choice(TEXTS): some_plain(random, 3) for _ in range(random.randrange(3))}
    if get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return tuple(some_value(random, arguments[0]) for _ in range(random.randrange(4)))
    assert get_origin(hint) is tuple, hint
    return tuple(some_value(random, argument) for argument in arguments)


def some_message(random: Random, kind: type) -> Any:
    """Well formed; its values are any."""
    if kind in WITH_TRAJECTORIES:
        several = tuple(some_trajectory(random) for _ in range(random.randrange(4)))
        others: dict[str, Any] = {"step": random.choice(INTEGERS)} if kind is msg.Batch else {}
        if kind is msg.Verify:
            others = {"name": random.choice(TEXTS), "session": random.choice(INTEGERS)}
        return kind(trajectories=several, **others)
    hints = get_type_hints(kind)
    return kind(**{name: some_value(random, hints[name]) for name in kind.__struct_fields__})


def some_plain(random: Random, depth: int) -> Any:
    """Anything msgpack can hold."""
    choice = random.randrange(9 if depth else 6)
    simple: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.choice(INTEGERS),
        lambda: random.choice(FLOATS),
        lambda: random.choice(TEXTS),
        lambda: random.random() < 0.5,
        lambda: random.randbytes(random.randrange(6)),
    ]
    if choice < 6:
        return simple[choice]()
    if choice == 6:
        return msgpack.ExtType(random.randrange(128), random.randbytes(random.randrange(13)))
    inner = [some_plain(random, depth - 1) for _ in range(random.randrange(4))]
    return inner if choice == 7 else {random.choice((*TEXTS, b"bytes")): value for value in inner}


def random_header(random: Random) -> list[bytes]:
    """msgpack that looks like a message: a known kind, the right names, any values."""
    kind = random.choice(KINDS)
    names = [name for name in kind.__struct_fields__ if name != "blobs" or random.random() < 0.1]
    values = {name: some_plain(random, 3) for name in names if random.random() < 0.95}
    content = values if random.random() < 0.9 else some_plain(random, 4)
    header = [SCHEMA if random.random() < 0.95 else some_plain(random, 1), kind.__name__, content]
    frames = [msgpack.packb(header)]
    return [*frames, *(random.randbytes(random.randrange(40)) for _ in range(random.choice((0, 0, 0, 1, 2))))]


def bent(random: Random, frames: list[bytes]) -> list[bytes]:
    """Valid frames with one to three things done to them."""
    made = [bytearray(frame) for frame in frames]
    for _ in range(random.choice((1, 1, 2, 3))):
        if not made:
            break
        frame = random.choice(made)
        at = random.randrange(len(frame)) if frame else 0
        match random.randrange(10):
            case 0 | 1 | 2:
                for _ in range(random.randint(1, 3)):
                    if frame:
                        frame[random.randrange(len(frame))] ^= 1 << random.randrange(8)
            case 3:
                del frame[at:]
            case 4:
                frame[at : at + 4] = struct.pack("<I", random.choice((0, 1, 2**31, 2**32 - 1, random.getrandbits(32))))
            case 5 if frame:
                frame[at] = random.choice(MARKERS)
            case 6:
                other = random.choice(made)
                frame[at:at] = other[random.randrange(len(other) + 1) :][:64]
            case 7:
                frame += random.randbytes(random.randrange(1, 20))
            case 8:
                made.insert(random.randrange(len(made) + 1), bytearray(random.choice(made)))
            case 9:
                made.remove(frame)
    return [bytes(frame) for frame in made]


def some_frames(random: Random, valid: list[list[bytes]]) -> list[bytes]:
    """One input. `valid`: frames to bend besides those of random messages."""
    match random.randrange(8):
        case 0:
            return [random.randbytes(random.randrange(120)) for _ in range(random.randrange(4))]
        case 1:
            return random_header(random)
        case 2 | 3:
            return frames_of(some_message(random, random.choice(KINDS)))
        case 4 | 5:
            return bent(random, frames_of(some_message(random, random.choice(KINDS))))
        case _:
            return bent(random, random.choice(valid)) if random.random() < 0.9 else random.choice(valid)


def frames_of(message: msg.Message) -> list[bytes]:
    return [bytes(frame) for frame in encode(message)]


def forged(random: Random, true: Trajectory) -> Trajectory:
    """What a holder of the permit might send instead: all but one or two things right."""
    any_other = some_trajectory(random)
    names = random.sample(
        [name for name in Trajectory.__struct_fields__ if name not in ("turns", "versions")], random.randint(1, 2)
    )
    if {"tokens", "log_behaviour"} & set(names):
        names = ["tokens", "log_behaviour", "turns", "versions"]
    return replace(true, **{name: getattr(any_other, name) for name in names})
