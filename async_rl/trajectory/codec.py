"""One trajectory <-> one blob. The same bytes cross the wire and lie in the store.

A blob (little endian, each column aligned to its own item size, length a multiple of 8):

    fixed part, 96 bytes     see `_FIXED`
    text                     msgpack [reason, generator, info], with agents [..., names], with notes on turns or tokens
                             [..., names, names of notes on turns, names of notes on tokens]; padded to 8
    turn_reward f8[turns]    only when a turn has a reward
    state_key   i8[turns]    only when a turn has a key
    temperature f8[turns]    only when a turn has its own
    note        f8[turns]    for each name of a note on turns; NaN where a turn has none
    tokens      i4[tokens]
    log_behaviour f4         [tokens]; of the policy tokens only when those are few (zeros elsewhere)
    note        f4           like log_behaviour, for each name of a note on tokens; NaN where there is none
    (start, length) i4 of each turn | (version, start, end) i4 of each span | start i4 of each further context
    agent i4[turns]          only when a turn has one: index into the names | padding to 8

A token takes about 8 bytes. Nothing in a blob is executable. Whatever is wrong with one is a `WireError`.

Turns and spans are few, so they go through `struct`, which costs a quarter of what an array does.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import msgpack
import msgspec
import numpy as np
from msgspec.structs import astuple, replace
from numpy.typing import NDArray

from async_rl.trajectory.turn_notes import MOST_NAMES, Notes
from async_rl.trajectory.types import Ended, Split, Trajectory, Turn, VersionSpan

assert sys.byteorder == "little", "columns are sent as they lie in memory, which is little endian"

Blob = bytes | memoryview
WireKind = Literal["bytes", "message", "schema", "fields", "frames", "trajectory", "columns", "size"]
"""What is wrong with bytes: no msgpack; no message of ours; of another schema; fields missing, extra or of the
wrong type; frames that are not those of the header; a blob that is no trajectory; a trajectory that contradicts
itself; larger than is taken."""

SCHEMA = 2
_MAGIC = b"TJ"
_FIXED = struct.Struct("<2sHI qqqQ dddd IIII BBBxI")
# magic, schema, text bytes | group, sample, problem, seed | reward, temperature, started_at, finished_at |
# tokens, log-probs, turns, spans | split, ended, flags, contexts
_REWARDS, _KEYS, _DENSE, _TEMPERATURES, _AGENTS, _CONTEXTS, _NOTES = 1, 2, 4, 8, 16, 32, 64
_ALL_FLAGS = _REWARDS | _KEYS | _DENSE | _TEMPERATURES | _AGENTS | _CONTEXTS | _NOTES
_SPLITS = get_args(Split)
_ENDINGS = get_args(Ended)
_LAST = len(_ENDINGS) - 1
_FEW = 128
"""tokens that are not the policy's: sending their log-probs, all zero, costs less than leaving them out"""
_SHORT_TEXT = 128
"""bytes; a longer text is not kept in the cache"""
_MOST_TEXT_BYTES = 1 << 20
_MOST_TURNS = 1 << 16
"""turns, spans of versions, or contexts"""
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_ZEROS = bytes(8)
_SMALL = 1 << 14
"""bytes of a blob that is copied"""
_EIGHT = _REWARDS | _KEYS | _TEMPERATURES
_EIGHTS = [flags.bit_count() for flags in range(_EIGHT + 1)]
"""columns of 8 bytes a turn, notes aside, by flags"""
_LENGTH = "a trajectory of {} bytes does not have the length its header says"
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
    flags, eights, noted, many = 0, b"", None, len(turns)
    starts, lengths, rewards, keys, agents, temperatures, notes, token_notes = _columns(turns)
    integers: list[int] = [0] * (2 * many)
    integers[::2], integers[1::2] = starts, lengths
    try:
        if any(rewards):
            flags |= _REWARDS
            eights = struct.pack(f"<{many}d", *rewards)
        if keys.count(-1) != many:
            flags |= _KEYS
            eights += struct.pack(f"<{many}q", *keys)
        if any(temperatures):
            flags |= _TEMPERATURES
            eights += struct.pack(f"<{many}d", *temperatures)
        if any(notes) or any(token_notes):
            noted = Notes.of(turns)
            flags |= _NOTES
            eights += noted.of_turns(turns)
        num_other = len(tokens) - sum(lengths)
        if num_other <= max(len(tokens) // 4, _FEW):
            flags |= _DENSE
            log_policy = log_behaviour.tobytes()
        else:
            policy = [log_behaviour[turn.start : turn.start + turn.length].tobytes() for turn in turns]
            log_policy = b"".join(policy)
        num_log = len(log_policy) // 4
        if noted is not None:
            log_policy += noted.of_tokens(turns, num_log, dense=bool(flags & _DENSE))
        for span in trajectory.versions:
            integers += (span.version, span.start, span.end)
        if trajectory.contexts:
            flags |= _CONTEXTS
            integers += trajectory.contexts
        names: dict[str, int] = {}
        if any(agents):
            flags |= _AGENTS
            integers += [names.setdefault(agent, len(names)) for agent in agents]
        fours = struct.pack(f"<{len(integers)}i", *integers)
        if (len(tokens) + len(log_policy) // 4 + len(integers)) % 2:
            fours += _ZEROS[:4]
        head, text = _head(trajectory, num_log, flags, tuple(names), noted)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"a number of the trajectory does not fit its column: {error}") from None
    padding = _ZEROS[: -len(text) % 8]
    return b"".join((head, text, padding, eights, tokens.tobytes(), log_policy, fours))


def _columns(turns: Sequence[Turn]) -> Sequence[Sequence[Any]]:
    """The fields of turns, each in the order of the turns."""
    return tuple(zip(*map(astuple, turns), strict=True)) if turns else ((),) * len(Turn.__struct_fields__)


def _head(
    trajectory: Trajectory, num_log: int, flags: int, names: Sequence[str], noted: Notes | None
) -> tuple[bytes, bytes]:
    """Fixed part and text. `names`: of the agents; empty: there are none. `noted`: names of notes."""
    info: dict[str, float | str] = {}
    if trajectory.info:
        info = {name: v if type(v) is str else float(v) for name, v in trajectory.info.items()}
    said = (trajectory.reason, trajectory.generator, info)
    more: tuple[Sequence[str], ...] = (names,) if names else ()
    if noted is not None:
        more = (names, noted.turn_names, noted.token_names)
    text: bytes = _pack_text((*said, *more))
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
        len(trajectory.contexts),
    )
    return fixed, text


def unpack(blob: Blob) -> Trajectory:
    """The trajectory of one blob, checked. Its columns are read-only views into the blob where that is possible.

    Raises WireError."""
    if len(blob) <= _SMALL:  # it may lie at any offset of the socket's buffer, and bytes are cut faster than views
        blob = bytes(blob)
    # fmt: off
    (
        text_bytes, group, sample, problem, seed, reward, temperature, started_at,
        finished_at, num_tokens, num_log, num_turns, num_spans, split, ended, flags, num_contexts,
    ) = _fixed(blob)
    # fmt: on
    offset = _FIXED.size + text_bytes + -text_bytes % 8
    on_turns = on_tokens = 0
    if flags & _NOTES:
        noted = _note_names(blob, text_bytes)
        on_turns, on_tokens = len(noted.turn_names), len(noted.token_names)
    places = 2 * num_turns + 3 * num_spans
    by_turn = num_turns if flags & _AGENTS else 0
    numbers = places + num_contexts + by_turn
    fours = num_tokens + num_log * (1 + on_tokens) + numbers
    if offset + 8 * num_turns * (_EIGHTS[flags & _EIGHT] + on_turns) + 4 * (fours + fours % 2) != len(blob):
        raise WireError(_LENGTH.format(len(blob)), "trajectory")
    large = num_contexts or text_bytes + numbers > _MOST_TURNS
    if large or split > 1 or ended > _LAST or flags >= _CONTEXTS or group < 0 or sample < 0 or problem < 0:
        _check_numbers(blob)
    reason, generator, info, names, _, _ = _said(blob[_FIXED.size : _FIXED.size + text_bytes], flags)
    rewards, keys, temperatures = _eights(blob, offset, num_turns, flags) if flags & _EIGHT else (None, None, None)
    offset += 8 * num_turns * _EIGHTS[flags & _EIGHT]
    turn_notes: list[tuple[float, ...]] = []
    token_notes: list[NDArray[np.float32]] = []
    for _ in range(on_turns):
        turn_notes.append(struct.unpack_from(f"<{num_turns}d", blob, offset))
        offset += 8 * num_turns
    tokens = np.frombuffer(blob, _INT32, num_tokens, offset)
    offset += 4 * num_tokens
    log_behaviour = np.frombuffer(blob, _FLOAT32, num_log, offset)
    offset += 4 * num_log
    for _ in range(on_tokens):
        token_notes.append(np.frombuffer(blob, _FLOAT32, num_log, offset))
        offset += 4 * num_log
    if not tokens.flags.aligned:
        tokens, log_behaviour = tokens.copy(), log_behaviour.copy()
    found = struct.unpack_from(f"<{numbers}i", blob, offset)
    turns = _turns(found[: 2 * num_turns], rewards, keys)
    if flags & (_AGENTS | _TEMPERATURES):
        turns = _described(turns, found[places + num_contexts :] if flags & _AGENTS else None, names, temperatures)
    if not flags & _DENSE:
        log_behaviour, *token_notes = [_spread(c, turns, num_tokens) for c in (log_behaviour, *token_notes)]
    if flags & _NOTES:
        turns = noted.put(turns, turn_notes, token_notes)
    trajectory = Trajectory(
        group=group,
        sample=sample,
        problem=problem,
        split=_SPLITS[split],
        seed=seed,
        tokens=tokens,
        log_behaviour=log_behaviour,
        turns=turns,
        versions=_spans(found[2 * num_turns : places]),
        reward=reward,
        ended=_ENDINGS[ended],
        temperature=temperature,
        contexts=found[places : places + num_contexts],
        reason=reason,
        generator=generator,
        started_at=started_at,
        finished_at=finished_at,
        info=info.copy(),
    )
    if (wrong := trajectory.check()) is not None:
        raise WireError(f"trajectory {sample} of group {group}: {wrong}", "columns")
    return trajectory


def _eights(
    blob: Blob, offset: int, num_turns: int, flags: int
) -> tuple[Sequence[float] | None, Sequence[int] | None, Sequence[float] | None]:
    """Rewards, keys and temperatures of the turns, where there are any."""
    rewards = keys = None
    if flags & _REWARDS:
        rewards = struct.unpack_from(f"<{num_turns}d", blob, offset)
        offset += 8 * num_turns
    if flags & _KEYS:
        keys = struct.unpack_from(f"<{num_turns}q", blob, offset)
        offset += 8 * num_turns
    return rewards, keys, struct.unpack_from(f"<{num_turns}d", blob, offset) if flags & _TEMPERATURES else None


def _check_numbers(blob: Blob) -> None:
    """Raises WireError for a trajectory that is too large, or whose numbers stand for nothing: what `unpack` does not
    see at once to be neither."""
    # fmt: off
    (
        text_bytes, group, sample, problem, _, _, _, _, _, _, _,
        num_turns, num_spans, split, ended, flags, num_contexts,
    ) = _fixed(blob)
    # fmt: on
    if text_bytes > _MOST_TEXT_BYTES or max(num_turns, num_spans, num_contexts) > _MOST_TURNS:
        said = f"{text_bytes} bytes of text, {num_turns} turns, {num_spans} spans, {num_contexts + 1} contexts"
        raise WireError(f"a trajectory of {said}", "size")
    if group < 0 or sample < 0 or problem < 0:
        raise WireError("a trajectory's group, sample or problem is below zero", "columns")
    if split >= len(_SPLITS) or ended >= len(_ENDINGS) or flags > _ALL_FLAGS:
        raise WireError("a trajectory of unknown split, ending or flags", "trajectory")
    if bool(flags & _CONTEXTS) != bool(num_contexts):
        raise WireError(f"a trajectory of {num_contexts + 1} contexts whose flags say otherwise", "trajectory")


def tokens_in(blob: Blob) -> tuple[int, int]:
    """(offset, number) of the tokens in the blob of a trajectory. Raises WireError when it cannot hold them."""
    text_bytes, *_, num_tokens, _, num_turns, _, _, _, flags, _ = _fixed(blob)
    noted = _note_names(blob, text_bytes) if flags & _NOTES else Notes()
    offset: int = (
        _FIXED.size + text_bytes + -text_bytes % 8 + 8 * num_turns * (_EIGHTS[flags & _EIGHT] + len(noted.turn_names))
    )
    if offset + 4 * num_tokens > len(blob):
        raise WireError(_LENGTH.format(len(blob)), "trajectory")
    return offset, num_tokens


def _fixed(blob: Blob) -> tuple[Any, ...]:
    """The numbers of the fixed part, from the text's bytes on."""
    if len(blob) < _FIXED.size:
        raise WireError(f"a trajectory of {len(blob)} bytes is truncated", "trajectory")
    numbers = _FIXED.unpack_from(blob)
    if numbers[0] != _MAGIC:
        raise WireError("not a trajectory", "trajectory")
    if numbers[1] != SCHEMA:
        raise WireError(f"a trajectory of schema {numbers[1]}; this program reads {SCHEMA}", "schema")
    return numbers[2:]


def _note_names(blob: Blob, text_bytes: int) -> Notes:
    """The names of notes, on which the length of a blob depends."""
    if text_bytes > _MOST_TEXT_BYTES or _FIXED.size + text_bytes > len(blob):
        raise WireError(_LENGTH.format(len(blob)), "trajectory")
    *_, turn_names, token_names = _said(blob[_FIXED.size : _FIXED.size + text_bytes], _NOTES)
    if len(turn_names) + len(token_names) > MOST_NAMES:
        raise WireError(f"a trajectory with notes of {len(turn_names) + len(token_names)} names", "size")
    return Notes(turn_names=tuple(turn_names), token_names=tuple(token_names))


def _turns(places: Sequence[int], rewards: Sequence[float] | None, keys: Sequence[int] | None) -> tuple[Turn, ...]:
    """`places`: start and length of each."""
    starts, lengths = places[::2], places[1::2]
    if keys is None and rewards is None:
        return tuple([Turn(start=start, length=length) for start, length in zip(starts, lengths, strict=True)])
    if rewards is None:
        assert keys is not None
        return tuple([Turn(start=s, length=n, state_key=k) for s, n, k in zip(starts, lengths, keys, strict=True)])
    rest = zip(starts, lengths, rewards, keys or (-1,) * len(starts), strict=True)
    return tuple([Turn(start=s, length=n, reward=reward, state_key=key) for s, n, reward, key in rest])


def _spans(numbers: Sequence[int]) -> tuple[VersionSpan, ...]:
    """`numbers`: version, start and end of each."""
    if len(numbers) == 3:
        return (VersionSpan(version=numbers[0], start=numbers[1], end=numbers[2]),)
    each = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return tuple([VersionSpan(version=version, start=start, end=end) for version, start, end in each])


def _described(
    turns: tuple[Turn, ...], spoken: Sequence[int] | None, names: Sequence[str], temperatures: Sequence[float] | None
) -> tuple[Turn, ...]:
    """The turns with their agents (`spoken`: index of each into `names`) and temperatures."""
    if spoken is not None and spoken and not 0 <= min(spoken) <= max(spoken) < len(names):
        raise WireError(f"a turn's agent is none of the {len(names)} that are named", "columns")
    agents = [""] * len(turns) if spoken is None else [names[i] for i in spoken]
    own = temperatures or (0.0,) * len(turns)
    return tuple([replace(t, agent=a, temperature=x) for t, a, x in zip(turns, agents, own, strict=True)])


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


Said = tuple[str, str, dict[str, float | str], Sequence[str], Sequence[str], Sequence[str]]
"""reason, generator, info, names of agents, of notes on turns, of notes on tokens"""


def _said(packed: Blob, flags: int) -> Said:
    """What the text says; info is that of the cache."""
    if len(packed) > _SHORT_TEXT:
        return _text(packed, flags)
    return _short_text(bytes(packed), flags & (_AGENTS | _NOTES))


def _text(packed: Blob, flags: int) -> Said:
    try:
        found = plain(packed, _MOST_TEXT_BYTES)
        if flags & _NOTES:
            return msgspec.convert(found, tuple[str, str, dict[str, float | str], list[str], list[str], list[str]])
        if flags & _AGENTS:
            return (*msgspec.convert(found, tuple[str, str, dict[str, float | str], list[str]]), (), ())
        return (*msgspec.convert(found, tuple[str, str, dict[str, float | str]]), (), (), ())
    except msgspec.ValidationError as error:
        raise WireError(f"a trajectory's text has missing, extra or wrong-typed fields: {error}", "fields") from None


_short_text = lru_cache(maxsize=1024)(_text)
"""most texts name a generator and little else, again and again"""
