"""One trajectory <-> one blob. The same bytes cross the wire and lie in the store.

A blob (little endian, each column aligned to its own item size, length a multiple of 8):

    fixed part, 96 bytes     see `_FIXED`
    text                     msgpack [reason, generator, info], padded to 8
    turn_reward f8[turns]    only when a turn has a reward
    state_key   i8[turns]    only when a turn has a key
    tokens      i4[tokens]
    log_behaviour f4         [tokens]; of the policy tokens only when those are few (zeros elsewhere)
    (start, length) i4 of each turn | (version, start, end) i4 of each span | padding to 8

A token takes about 8 bytes. Nothing in a blob is executable. Whatever is wrong with one is a `WireError`.

Turns and spans are few, so they go through `struct`, which costs a quarter of what an array does.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, Literal, get_args

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from async_rl.trajectory.types import Ended, Split, Trajectory, Turn, VersionSpan

assert sys.byteorder == "little", "columns are sent as they lie in memory, which is little endian"

Blob = bytes | memoryview
WireKind = Literal["bytes", "message", "schema", "fields", "frames", "trajectory", "columns", "size"]
"""What is wrong with bytes: no msgpack; no message of ours; of another schema; fields missing, extra or of the
wrong type; frames that are not those of the header; a blob that is no trajectory; a trajectory that contradicts
itself; larger than is taken."""

SCHEMA = 2
_MAGIC = b"TJ"
_FIXED = struct.Struct("<2sHI qqqQ dddd IIII BBB5x")
# magic, schema, text bytes | group, sample, problem, seed | reward, temperature, started_at, finished_at |
# tokens, log-probs, turns, spans | split, ended, flags
_REWARDS, _KEYS, _DENSE = 1, 2, 4
_SPLITS = get_args(Split)
_ENDINGS = get_args(Ended)
_FEW = 128
"""tokens that are not the policy's: sending their log-probs, all zero, costs less than leaving them out"""
_SHORT_TEXT = 128
"""bytes; a longer text is not kept in the cache"""
_MOST_TEXT_BYTES = 1 << 20
_MOST_TURNS = 1 << 16
"""turns, or spans of versions"""
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_ZEROS = bytes(8)
_TURN, _SPAN = struct.Struct("<ii"), struct.Struct("<iii")
# half a surrogate pair in an error's text must not lose the trajectory
_pack_text = msgpack.Packer(unicode_errors="replace").pack


class WireError(Exception):
    """Bytes that are no message of ours: malformed, truncated, oversized or of another schema.

    The message is the reason, `kind` is what it is counted under. The receiver counts it and goes on.
    """

    def __init__(self, reason: str, kind: WireKind) -> None:
        super().__init__(reason)
        self.kind: WireKind = kind


# ---------------------------------------------------------------- blob of a trajectory


def pack(trajectory: Trajectory) -> bytes:
    """The blob of one trajectory. It is expected to pass `Trajectory.check()`, else the receiver refuses it.

    Raises ValueError when a number does not fit its column."""
    turns = trajectory.turns
    tokens, log_behaviour = trajectory.tokens, trajectory.log_behaviour
    assert tokens.dtype == _INT32 and log_behaviour.dtype == _FLOAT32 and tokens.ndim == 1  # noqa: PT018
    flags, eights = 0, b""
    integers = [number for turn in turns for number in (turn.start, turn.length)]
    rewards, keys = [turn.reward for turn in turns], [turn.state_key for turn in turns]
    try:
        if any(rewards):
            flags |= _REWARDS
            eights = struct.pack(f"<{len(rewards)}d", *rewards)
        if keys.count(-1) != len(keys):
            flags |= _KEYS
            eights += struct.pack(f"<{len(keys)}q", *keys)
        num_other = len(tokens) - sum(integers[1::2])
        if num_other <= max(len(tokens) // 4, _FEW):
            flags |= _DENSE
            log_policy = log_behaviour.tobytes()
        else:
            policy = [log_behaviour[turn.start : turn.start + turn.length].tobytes() for turn in turns]
            log_policy = b"".join(policy)
        num_log = len(log_policy) // 4
        integers += [number for s in trajectory.versions for number in (s.version, s.start, s.end)]
        fours = struct.pack(f"<{len(integers)}i", *integers)
        if (len(tokens) + num_log + len(integers)) % 2:
            fours += _ZEROS[:4]
        head, text = _head(trajectory, num_log, flags)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"a number of the trajectory does not fit its column: {error}") from None
    padding = _ZEROS[: -len(text) % 8]
    return b"".join((head, text, padding, eights, tokens.tobytes(), log_policy, fours))


def _head(trajectory: Trajectory, num_log: int, flags: int) -> tuple[bytes, bytes]:
    """Fixed part and text."""
    info: dict[str, float | str] = {}
    if trajectory.info:
        info = {name: v if type(v) is str else float(v) for name, v in trajectory.info.items()}
    text: bytes = _pack_text((trajectory.reason, trajectory.generator, info))
    fixed = _FIXED.pack(
        _MAGIC,
        SCHEMA,
        len(text),
        trajectory.group,
        trajectory.sample,
        trajectory.problem,
        trajectory.seed,
        trajectory.reward,
        trajectory.temperature,
        trajectory.started_at,
        trajectory.finished_at,
        len(trajectory.tokens),
        num_log,
        len(trajectory.turns),
        len(trajectory.versions),
        _SPLITS.index(trajectory.split),
        _ENDINGS.index(trajectory.ended),
        flags,
    )
    return fixed, text


def unpack(blob: Blob) -> Trajectory:
    """The trajectory of one blob, checked. Its columns are read-only views into the blob where that is possible.

    Raises WireError."""
    # fmt: off
    (
        text_bytes, group, sample, problem, seed, reward, temperature, started_at,
        finished_at, num_tokens, num_log, num_turns, num_spans, split, ended, flags,
    ) = _fixed(blob)
    # fmt: on
    offset = _FIXED.size + text_bytes + -text_bytes % 8
    eights = num_turns * (bool(flags & _REWARDS) + bool(flags & _KEYS))
    fours = num_tokens + num_log + 2 * num_turns + 3 * num_spans
    if offset + 8 * eights + 4 * (fours + fours % 2) != len(blob):
        raise WireError(f"a trajectory of {len(blob)} bytes does not have the length its header says", "trajectory")
    if text_bytes > _MOST_TEXT_BYTES or num_turns > _MOST_TURNS or num_spans > _MOST_TURNS:
        raise WireError(f"a trajectory of {text_bytes} bytes of text, {num_turns} turns, {num_spans} spans", "size")
    if group < 0 or sample < 0 or problem < 0:
        raise WireError("a trajectory's group, sample or problem is below zero", "columns")
    if split >= len(_SPLITS) or ended >= len(_ENDINGS) or flags > _REWARDS | _KEYS | _DENSE:
        raise WireError("a trajectory of unknown split, ending or flags", "trajectory")
    if text_bytes <= _SHORT_TEXT:
        reason, generator, labels = _short_text(bytes(blob[_FIXED.size : _FIXED.size + text_bytes]))
        info = labels.copy()
    else:
        reason, generator, info = _text(blob[_FIXED.size : _FIXED.size + text_bytes])
    rewards: Sequence[float] | None = None
    keys: Sequence[int] | None = None
    if flags & _REWARDS:
        rewards = struct.unpack_from(f"<{num_turns}d", blob, offset)
        offset += 8 * num_turns
    if flags & _KEYS:
        keys = struct.unpack_from(f"<{num_turns}q", blob, offset)
        offset += 8 * num_turns
    tokens = np.frombuffer(blob, np.int32, num_tokens, offset)
    offset += 4 * num_tokens
    log_behaviour = np.frombuffer(blob, np.float32, num_log, offset)
    if not tokens.flags.aligned:  # a small frame lies at any offset of the socket's buffer
        tokens, log_behaviour = tokens.copy(), log_behaviour.copy()
    offset += 4 * num_log
    # a copy: an iterator over a memoryview that stays in a traceback crashes the garbage collector of Python 3.11
    places = bytes(blob[offset:])
    middle = _TURN.size * num_turns
    turns = _turns(places[:middle], rewards, keys)
    spans = _SPAN.iter_unpack(places[middle : middle + _SPAN.size * num_spans])
    versions = tuple([VersionSpan(version=version, start=start, end=end) for version, start, end in spans])
    if not flags & _DENSE:
        log_behaviour = _spread(log_behaviour, turns, num_tokens)
    trajectory = Trajectory(
        group=group,
        sample=sample,
        problem=problem,
        split=_SPLITS[split],
        seed=seed,
        tokens=tokens,
        log_behaviour=log_behaviour,
        turns=turns,
        versions=versions,
        reward=reward,
        ended=_ENDINGS[ended],
        temperature=temperature,
        reason=reason,
        generator=generator,
        started_at=started_at,
        finished_at=finished_at,
        info=info,
    )
    wrong = trajectory.check()
    if wrong is not None:
        raise WireError(f"trajectory {sample} of group {group}: {wrong}", "columns")
    return trajectory


def _fixed(blob: Blob) -> list[Any]:
    """The numbers of the fixed part, from the text's bytes on."""
    if len(blob) < _FIXED.size:
        raise WireError(f"a trajectory of {len(blob)} bytes is truncated", "trajectory")
    magic, schema, *numbers = _FIXED.unpack_from(blob)
    if magic != _MAGIC:
        raise WireError("not a trajectory", "trajectory")
    if schema != SCHEMA:
        raise WireError(f"a trajectory of schema {schema}; this program reads {SCHEMA}", "schema")
    return numbers


def _turns(packed: bytes, rewards: Sequence[float] | None, keys: Sequence[int] | None) -> tuple[Turn, ...]:
    places = _TURN.iter_unpack(packed)
    if rewards is None and keys is None:
        return tuple([Turn(start=start, length=length) for start, length in places])
    rest = zip(places, rewards or repeat(0.0), keys or repeat(-1), strict=False)
    return tuple([Turn(start=s, length=n, reward=reward, state_key=key) for (s, n), reward, key in rest])


def _spread(policy: NDArray[np.float32], turns: tuple[Turn, ...], num_tokens: int) -> NDArray[np.float32]:  # [tokens]
    """The policy tokens' log-probs at their positions, zero elsewhere."""
    spread = np.zeros(num_tokens, dtype=np.float32)
    taken = position = 0
    for turn in turns:
        end = turn.start + turn.length
        if turn.length < 0 or turn.start < position or end > num_tokens:
            raise WireError(
                f"turn at {turn.start}+{turn.length} is out of order or outside {num_tokens} tokens",
                "columns",
            )
        if taken + turn.length > len(policy):
            break
        spread[turn.start : end] = policy[taken : taken + turn.length]
        taken, position = taken + turn.length, end
    if taken != len(policy) or sum(turn.length for turn in turns) != taken:
        raise WireError(f"{len(policy)} log-probs do not cover the tokens of {len(turns)} turns", "columns")
    return spread


# ---------------------------------------------------------------- msgpack of another process


def plain(packed: Blob, most_bytes: int) -> Any:
    """The value that msgpack bytes from another process hold. Raises WireError, never anything else.

    A byte of msgpack may become an object of 64 bytes, hence the bound."""
    if len(packed) > most_bytes:
        raise WireError(f"{len(packed)} bytes of msgpack; no more than {most_bytes} are taken here", "size")
    try:
        return msgpack.unpackb(packed, object_pairs_hook=_table)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error or type(error).__name__}", "bytes") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a table has a name twice")
    return table


def _text(packed: Blob) -> tuple[str, str, dict[str, float | str]]:
    """Reason, generator, info."""
    try:
        return msgspec.convert(plain(packed, _MOST_TEXT_BYTES), tuple[str, str, dict[str, float | str]])
    except msgspec.ValidationError as error:
        raise WireError(f"a trajectory's text has missing, extra or wrong-typed fields: {error}", "fields") from None


_short_text = lru_cache(maxsize=1024)(_text)
"""most texts name a generator and little else, again and again"""
