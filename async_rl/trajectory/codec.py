"""One trajectory <-> one blob. The same bytes cross the wire and lie in the store.

A blob (little endian, each column aligned to its own item size, length a multiple of 8):

    "TJ" | u16 schema | u32 header bytes | header (msgpack list) | padding to 8
    turn_reward f8[turns]    only when a turn has a reward
    state_key   i8[turns]    only when a turn has a key
    tokens      i4[tokens]
    log_behaviour f4[policy tokens]     zeros elsewhere are not sent
    turn_start, turn_length i4[turns] | span_version, span_start, span_end i4[spans] | padding to 8

About 8 bytes a token. Nothing in it is executable. Whatever is wrong with a blob is a `WireError`.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

from async_rl.trajectory.types import Ended, Split, Trajectory, Turn, VersionSpan

assert sys.byteorder == "little", "columns are sent as they lie in memory, which is little endian"

SCHEMA = 1
_PREFIX = struct.Struct("<2sHI")
_MAGIC = b"TJ"
_REWARDS, _KEYS = 1, 2
_SPLITS = get_args(Split)
_ENDINGS = get_args(Ended)
_ZEROS = bytes(8)
# group, sample, problem, split, seed, reward, ended, temperature, reason, generator, started_at,
# finished_at, info, tokens, policy tokens, turns, spans, flags
_HEADER_TYPES = [int, int, int, str, int, float, str, float, str, str, float, float, dict] + [int] * 5
_INT64 = 1 << 63

Blob = bytes | memoryview


class WireError(Exception):
    """Bytes that are no message of ours: malformed, truncated, oversized or of another schema.

    The message is the reason. The receiver counts it and lives on.
    """


def plain(packed: Blob) -> Any:
    """What msgpack bytes from another process say. Raises WireError, never anything else."""
    try:
        return msgpack.unpackb(packed)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack: {error or type(error).__name__}") from None


def pack(trajectory: Trajectory) -> bytes:
    """The blob of one trajectory. It is expected to pass `Trajectory.check()`: the receiver refuses it
    otherwise. Raises ValueError when a number does not fit its column."""
    turns, spans = trajectory.turns, trajectory.versions
    tokens, log_behaviour = trajectory.tokens, trajectory.log_behaviour
    assert (tokens.dtype, log_behaviour.dtype, tokens.ndim) == (np.int32, np.float32, 1)
    if len(turns) == 1:
        policy = log_behaviour[turns[0].start : turns[0].start + turns[0].length]
    else:
        policy = log_behaviour[trajectory.policy_positions()]
    rewards = any(turn.reward != 0.0 for turn in turns)
    keys = any(turn.state_key != -1 for turn in turns)
    try:
        header = _header_of(trajectory, len(policy), _REWARDS * rewards | _KEYS * keys)
        columns: list[Any] = []
        if rewards:
            columns.append(np.array([turn.reward for turn in turns], dtype=np.float64).data)
        if keys:
            columns.append(np.array([turn.state_key for turn in turns], dtype=np.int64).data)
        integers = [turn.start for turn in turns] + [turn.length for turn in turns]
        integers += [span.version for span in spans]
        integers += [span.start for span in spans] + [span.end for span in spans]
        packed = np.array(integers, dtype=np.int32)
    except OverflowError as error:
        raise ValueError(f"a number of the trajectory does not fit its column: {error}") from None
    columns += [np.ascontiguousarray(tokens).data, np.ascontiguousarray(policy).data, packed.data]
    if (len(tokens) + len(policy) + len(packed)) % 2:
        columns.append(_ZEROS[:4])
    prefix = _PREFIX.pack(_MAGIC, SCHEMA, len(header))
    return b"".join((prefix, header, _ZEROS[: -len(header) % 8], *columns))


def _header_of(trajectory: Trajectory, num_policy: int, flags: int) -> bytes:
    return msgpack.packb(
        (
            int(trajectory.group),
            int(trajectory.sample),
            int(trajectory.problem),
            trajectory.split,
            int(trajectory.seed),
            float(trajectory.reward),
            trajectory.ended,
            float(trajectory.temperature),
            trajectory.reason,
            trajectory.generator,
            float(trajectory.started_at),
            float(trajectory.finished_at),
            {k: v if type(v) is str else float(v) for k, v in trajectory.info.items()},
            len(trajectory.tokens),
            num_policy,
            len(trajectory.turns),
            len(trajectory.versions),
            flags,
        ),
        unicode_errors="replace",  # half a surrogate pair in an error's text must not lose the trajectory
    )


def unpack(blob: Blob) -> Trajectory:
    """The trajectory of one blob, checked. Tokens are a read-only view into the blob where its
    alignment permits. Raises WireError."""
    header, offset = _header(blob)
    num_tokens, num_policy, num_turns, num_spans, flags = header[13:]
    eights = num_turns * (bool(flags & _REWARDS) + bool(flags & _KEYS))
    fours = num_tokens + num_policy + 2 * num_turns + 3 * num_spans
    if offset + 8 * eights + 4 * (fours + fours % 2) != len(blob):
        raise WireError(f"a trajectory of {len(blob)} bytes does not have the length its header says")
    reward: list[float] | None = None
    key: list[int] | None = None
    if flags & _REWARDS:
        reward = np.frombuffer(blob, np.float64, num_turns, offset).tolist()
        offset += 8 * num_turns
    if flags & _KEYS:
        key = np.frombuffer(blob, np.int64, num_turns, offset).tolist()
        offset += 8 * num_turns
    tokens = np.frombuffer(blob, np.int32, num_tokens, offset)
    if not tokens.flags.aligned:  # a small frame lies at any offset of the socket's buffer
        tokens = tokens.copy()
    offset += 4 * num_tokens
    policy = np.frombuffer(blob, np.float32, num_policy, offset)
    offset += 4 * num_policy
    integers = np.frombuffer(blob, np.int32, 2 * num_turns + 3 * num_spans, offset).tolist()
    turns = _turns(integers[: 2 * num_turns], reward, key)
    spans = integers[2 * num_turns :]
    trajectory = Trajectory(
        group=header[0],
        sample=header[1],
        problem=header[2],
        split=header[3],
        seed=header[4],
        reward=header[5],
        ended=header[6],
        temperature=header[7],
        reason=header[8],
        generator=header[9],
        started_at=header[10],
        finished_at=header[11],
        info=header[12],
        tokens=tokens,
        log_behaviour=_spread(policy, turns, num_tokens),
        turns=turns,
        versions=tuple(
            VersionSpan(version=version, start=start, end=end)
            for version, start, end in zip(
                spans[:num_spans], spans[num_spans : 2 * num_spans], spans[2 * num_spans :], strict=True
            )
        ),
    )
    wrong = trajectory.check()
    if wrong is not None:
        raise WireError(f"trajectory {trajectory.sample} of group {trajectory.group}: {wrong}")
    return trajectory


def _header(blob: Blob) -> tuple[list[Any], int]:
    """The header's values, their types and ranges checked, and where the columns begin."""
    if len(blob) < _PREFIX.size:
        raise WireError(f"a trajectory of {len(blob)} bytes is truncated")
    magic, schema, header_bytes = _PREFIX.unpack_from(blob)
    if magic != _MAGIC:
        raise WireError("not a trajectory")
    if schema != SCHEMA:
        raise WireError(f"a trajectory of schema {schema}; this program reads {SCHEMA}")
    end = _PREFIX.size + header_bytes
    if end > len(blob):
        raise WireError(f"a trajectory of {len(blob)} bytes is truncated")
    header = plain(memoryview(blob)[_PREFIX.size : end])
    if type(header) is not list or [type(value) for value in header] != _HEADER_TYPES:
        raise WireError("a trajectory's header has missing, extra or wrong-typed fields")
    group, sample, problem, split, seed = header[:5]
    if not (0 <= group < _INT64 and 0 <= sample < _INT64 and 0 <= problem < _INT64 and seed >= 0):
        raise WireError("a trajectory's group, sample, problem or seed is out of range")
    if split not in _SPLITS or header[6] not in _ENDINGS:
        raise WireError(f"a trajectory of split {split!r} that ended by {header[6]!r}")
    if min(header[13:]) < 0 or header[17] > _REWARDS | _KEYS:
        raise WireError("a trajectory's header has a negative length or unknown flags")
    for name, value in header[12].items():
        if type(name) is not str or type(value) not in (float, str):
            raise WireError("a trajectory's info holds something other than numbers and labels")
    return header, end + -header_bytes % 8


def _turns(integers: list[int], reward: list[float] | None, key: list[int] | None) -> tuple[Turn, ...]:
    n = len(integers) // 2
    pairs = zip(integers[:n], integers[n:], strict=True)
    if reward is None and key is None:
        return tuple(Turn(start=start, length=length) for start, length in pairs)
    reward, key = reward or [0.0] * n, key or [-1] * n
    return tuple(
        Turn(start=start, length=length, reward=r, state_key=k)
        for (start, length), r, k in zip(pairs, reward, key, strict=True)
    )


def _spread(
    policy: NDArray[np.float32], turns: tuple[Turn, ...], num_tokens: int
) -> NDArray[np.float32]:  # [tokens]
    """The policy tokens' log-probs at their positions, zero elsewhere."""
    spread = np.zeros(num_tokens, dtype=np.float32)
    taken = position = 0
    for turn in turns:
        end = turn.start + turn.length
        if turn.length < 0 or turn.start < position or end > num_tokens:
            raise WireError(
                f"turn at {turn.start}+{turn.length} is out of order or outside {num_tokens} tokens"
            )
        if taken + turn.length > len(policy):
            break
        spread[turn.start : end] = policy[taken : taken + turn.length]
        taken, position = taken + turn.length, end
    if taken != len(policy) or sum(turn.length for turn in turns) != taken:
        raise WireError(f"{len(policy)} log-probs do not cover the tokens of {len(turns)} turns")
    return spread
