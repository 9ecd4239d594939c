"""What trajectories of a group begin with alike is carried once: on the wire, in the store, between ranks.

A blob (trajectory/codec.py) whose first tokens are those of another sample of its group may be cut: they are left out,
and a head of 24 bytes in front of the rest says where they were, how many, of which sample they are, and what their
checksum is:

    magic "TC", schema u2 | offset of the tokens u4 | tokens left out u4 | crc32 of them u4 | sample i8

`join` puts them back byte by byte, so nothing of it shows to whoever reads a trajectory. The other sample may itself be
cut; it lies in the same message, or in the same store.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from async_rl.trajectory.codec import Blob, WireError, tokens_in
from async_rl.trajectory.types import Trajectory

_MAGIC, _SCHEMA = b"TC", 1
_HEAD = struct.Struct("<2sHIIIq")
_NAME = struct.Struct("<qq")
"""group and sample, behind the first 8 bytes of a blob"""
HEAD_BYTES = _HEAD.size
FEWEST = 64
"""tokens alike: for fewer, nothing is cut"""
_LEAST_SHARE = 8
"""a beginning of less than an eighth of the blob is not worth the work"""
_MOST_COMPARED = 16
"""samples that begin alike, with which one is compared"""
_MOST_GROUPS = 4096
"""of which it is known which samples are there: the last that began"""
_DEEPEST = 64
"""cut blobs that lead from one to another"""
_INT32 = np.dtype(np.int32)
Load = Callable[[int, int], Blob | None]
"""(group, sample) -> its blob, whole; None: it is not there"""


def is_cut(blob: Blob) -> bool:
    """Whether tokens of this blob are those of another."""
    return bytes(blob[:2]) == _MAGIC


def whole_bytes(head: Blob, num_bytes: int) -> int:
    """Bytes of a blob when it is whole. `head`: its first `HEAD_BYTES`; `num_bytes`: as it is."""
    if not is_cut(head) or len(head) < HEAD_BYTES:
        return num_bytes
    _, _, _, left_out, *_ = _HEAD.unpack_from(head)
    return num_bytes - HEAD_BYTES + 4 * int(left_out)


def name_of(blob: Blob) -> tuple[int, int]:
    """(group, sample) of a blob, cut or not. Raises WireError."""
    start = 8 + (HEAD_BYTES if is_cut(blob) else 0)
    if len(blob) < start + _NAME.size:
        raise WireError(f"a trajectory of {len(blob)} bytes is truncated", "trajectory")
    group, sample = _NAME.unpack_from(blob, start)
    return group, sample


def refers_to(blob: Blob) -> tuple[int, int]:
    """(group, sample) whose first tokens are those of this blob, which is cut. Raises WireError."""
    return name_of(blob)[0], _head(blob)[3]


@dataclass(slots=True)
class Beginnings:
    """Cuts blobs, one after another in the order in which they are carried or stored."""

    load: Load
    """of those that were given before"""
    known: OrderedDict[int, dict[int, list[int]]] = field(default_factory=OrderedDict)
    """group -> crc32 of the first tokens -> samples that begin with them"""

    def cut(self, trajectory: Trajectory, blob: Blob) -> Blob:
        """The blob of this trajectory without what another sample of its group begins with; as it is when that is
        little."""
        if len(trajectory.tokens) < FEWEST:
            return blob
        at, _ = tokens_in(blob)
        samples = self._alike(trajectory.group, crc32(blob[at : at + 4 * FEWEST]))
        beginning = next((turn.start for turn in trajectory.turns if turn.length), len(trajectory.tokens))
        found = None
        if samples and 4 * beginning * _LEAST_SHARE >= len(blob):
            found = self._longest(trajectory, bytes(blob[at : at + 4 * (beginning & ~1)]), samples)
        if trajectory.sample not in samples:
            samples.append(trajectory.sample)
        if found is None:
            return blob
        sample, alike = found
        end = at + 4 * alike
        head = _HEAD.pack(_MAGIC, _SCHEMA, at, alike, crc32(blob[at:end]), sample)
        return b"".join((head, blob[:at], blob[end:]))

    def _alike(self, group: int, first: int) -> list[int]:
        """Samples of the group whose first tokens have this sum; whether they are the same is looked at later."""
        if (of_group := self.known.get(group)) is None:
            self.known[group] = of_group = {}
            if len(self.known) > _MOST_GROUPS:
                self.known.popitem(last=False)
        return of_group.setdefault(first, [])

    def _longest(self, trajectory: Trajectory, beginning: bytes, samples: Sequence[int]) -> tuple[int, int] | None:
        """(sample, tokens alike): of the first one that begins with `beginning`, which ends where the policy of this
        one speaks, else of the one that has most in common with it. An even number: what follows stays aligned to 8."""
        best: tuple[int, int] | None = None
        for sample in samples[:_MOST_COMPARED]:
            if sample == trajectory.sample or (other := self.load(trajectory.group, sample)) is None:
                continue
            try:
                at, count = tokens_in(other)
            except WireError:  # damaged in the store
                continue
            if bytes(other[at : at + len(beginning)]) == beginning and 4 * count >= len(beginning):
                return sample, len(beginning) // 4
            alike = _common(trajectory.tokens, np.frombuffer(other, np.int32, count, at)) & ~1
            if alike >= FEWEST and (best is None or alike > best[1]):
                best = sample, alike
        return best


def cut_all(trajectories: Iterable[Trajectory], blobs: Iterable[Blob], most_bytes: int) -> list[Blob]:
    """The blobs of one message, each cut where it can be; whole ones from where all would take more than `most_bytes`
    when they are put together again."""
    whole: dict[tuple[int, int], Blob] = {}
    beginnings = Beginnings(lambda group, sample: whole.get((group, sample)))
    found, total = [], 0
    for trajectory, blob in zip(trajectories, blobs, strict=True):
        total += len(blob)
        if total > most_bytes or (trajectory.group, trajectory.sample) in whole:
            found.append(blob)
            continue
        found.append(beginnings.cut(trajectory, blob))
        whole[trajectory.group, trajectory.sample] = blob
    return found


@dataclass(slots=True)
class Joining:
    """Puts blobs together again."""

    there: dict[tuple[int, int], Blob]
    """by (group, sample), cut or whole; those that were cut become whole on the way"""

    def whole(self, blob: Blob, depth: int = 0) -> Blob:
        """The whole blob of this one. Raises WireError when what is left out of it is not there or not the same."""
        if not is_cut(blob):
            return blob
        name = refers_to(blob)
        if depth > _DEEPEST:
            raise WireError(f"trajectories of group {name[0]} refer from one to another without end", "size")
        other = self.there.get(name)
        if other is not None and is_cut(other):
            self.there[name] = other = self.whole(other, depth + 1)
        return join(blob, other)


def join_all(blobs: Sequence[Blob], most_bytes: int) -> list[Blob]:
    """The blobs of one message, whole. Raises WireError, also when all would take more than `most_bytes`."""
    if not any(map(is_cut, blobs)):
        return list(blobs)
    total = sum(whole_bytes(blob[:HEAD_BYTES], len(blob)) for blob in blobs)
    if total > most_bytes:
        raise WireError(f"trajectories of {total} bytes; no more than {most_bytes} are taken here", "size")
    joining = Joining({})
    for blob in blobs:
        joining.there.setdefault(name_of(blob), blob)
    return [joining.whole(blob) for blob in blobs]


def join(blob: Blob, other: Blob | None) -> bytes:
    """The whole blob of one that is cut. `other`: the whole blob of the sample that it refers to; None: it is not
    there. Raises WireError."""
    at, left_out, checksum, sample = _head(blob)
    group, own = name_of(blob)
    said = f"trajectory {own} of group {group} begins as sample {sample}"
    if other is None:
        raise WireError(f"{said}, which is not there", "trajectory")
    start, tokens = tokens_in(other)
    end = start + 4 * left_out
    if left_out > tokens or HEAD_BYTES + at > len(blob):
        raise WireError(f"{said}, which has not its {left_out} tokens", "trajectory")
    if crc32(other[start:end]) != checksum:
        raise WireError(f"{said}, which has other tokens", "trajectory")
    return b"".join((blob[HEAD_BYTES : HEAD_BYTES + at], other[start:end], blob[HEAD_BYTES + at :]))


def _head(blob: Blob) -> tuple[int, int, int, int]:
    """Offset, tokens left out, their checksum, sample."""
    if len(blob) < HEAD_BYTES:
        raise WireError(f"a cut trajectory of {len(blob)} bytes is truncated", "trajectory")
    _, schema, at, left_out, checksum, sample = _HEAD.unpack_from(blob)
    if schema != _SCHEMA:
        raise WireError(f"a cut trajectory of schema {schema}; this program reads {_SCHEMA}", "schema")
    return at, left_out, checksum, sample


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Tokens that both begin with."""
    most = min(len(one), len(other))
    differ = one[:most] != other[:most]
    first = int(differ.argmax()) if most else 0
    return first if most and differ[first] else most
