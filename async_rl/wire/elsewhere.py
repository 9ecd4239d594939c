"""The messages of weights and of generators that come by themselves, from other shells and hosts; a part of
messages.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from async_rl.trajectory.codec import Blob

Detail = Mapping[str, Any]
"""plain data: strings, numbers, booleans, None, and lists and dicts (with string keys) of these"""


# ---- a generator that joins by itself <-> buffer ------------------------------------------------

JOINED = "joined"
"""in the detail of the Hello of a generator that joined by itself"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Before its Hello: may I? Answered by `Welcome`, or `Refused`."""

    name: str
    package: str
    """version of async_rl"""
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Everything it must know of the run."""

    run: str
    settings: Detail
    """of the run, as in its config.yaml"""
    task_digest: str
    """of its problems (async_rl/digest.py)"""
    host: str
    """of the buffer (wire/host.py)"""
    folder: str
    """the buffer's working folder, where relative paths begin"""
    segment: str
    """file of the weights in that host's shared memory"""
    weights: str
    """where the weight server listens; empty: there is none"""


# ---- generator of another host <-> weight server ------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AskWeights:
    """Answered by `Offer`, or by `Waiting` while there is nothing newer."""

    after: int
    """a version newer than this; also: of what was offered before nothing more is wanted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A version that stays to be had while its chunks are asked for."""

    version: int
    num_bytes: int
    chunk_bytes: int
    """of every chunk but the last"""
    checksum: int
    """crc32 of all bytes"""
    layout: str
    """where each tensor lies among them (weights/layout.py)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskChunks:
    """Each is answered by `Chunk`; or all by `Withdrawn`."""

    version: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    version: int
    index: int
    checksum: int
    """crc32 of the content"""
    content: Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """This version is no longer there: ask for weights anew."""

    version: int


# ---- generator <-> trainer, of one host: weights that go straight into vLLM's workers ------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AskLink:
    """Bring me newer weights. Answered by `LinkCall`s, by `Waiting` while there is nothing newer, or `Refused`.
    Asking again changes nothing while the answer is under way."""

    name: str
    pid: int
    session: int
    """a number this life of the generator has alone: another life begins with a new link"""
    way: str
    """nccl or ipc"""
    workers: int
    """processes that hold the model together"""
    after: int
    """a version newer than this; -1: any"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCall:
    """What vLLM is to do next. Answered by `LinkAnswer` when it is done."""

    number: int
    method: str
    """init, start, update or finish, in this order; init once a link, update once or more"""
    version: int
    """of the weights that are sent; -1 for init"""
    detail: Detail
    """what vLLM's own method of that name is given"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAnswer:
    session: int
    number: int
    error: str = ""
    """why it could not be done"""
