"""The leader's orders to the other ranks: which collective comes next, and what it needs. One rank alone gives none.

Who waits for whom: the others wait for the next order, at most for the time-out of their collectives. Whatever the
leader waits for meanwhile (a batch, an evaluation, a disk), it sends a `KeepAlive` every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgpack
import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from async_rl.errors import RunFailed
from async_rl.run_folder import RunFolder, read_rows
from async_rl.trainer.forward import probe_log_probs
from async_rl.trainer.ranks import is_sharded
from async_rl.trainer.rescoring import Wanted
from async_rl.trajectory.beginnings import cut_all, join_all
from async_rl.trajectory.codec import pack, unpack

if TYPE_CHECKING:
    from async_rl.trainer.learner import Learner
    from async_rl.trainer.ranks import Ranks
    from async_rl.trajectory import Trajectory

_MOST_BATCH_BYTES = 1 << 40
"""no limit: what came here has passed that of the wire"""
HASH_PREFIX = "blake3:"
KEEPALIVE_S = 3.0
"""between two orders of a leader that waits"""
Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""tensors by name, or in order of name one after another"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Take this step."""

    step: int
    trajectories: Sequence[Trajectory]
    """of the whole batch"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Go through the sharded weights with the leader, who does something with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Run these tokens through the model: a sharded one needs every rank for a forward."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Of the versions before, keep this rank's part of these, and of the present one if that is among them."""

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescore:
    """Score these policy tokens under a held version: a sharded model needs every rank for a forward."""

    version: int
    most_tokens: int
    """of one forward"""
    wanted: Sequence[Wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Write this rank's part of a checkpoint."""

    folder: Path
    """where it is being written"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAlive:
    """Do nothing: the leader is there and waits for something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Stop following: the run is done, or every rank goes on by itself."""


Order = Train | Gather | Probe | Hold | Rescore | Save | KeepAlive | Finish


class Team:
    """The leader's side: orders, and what it does together with the other ranks."""

    def __init__(self, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        assert ranks.leads
        self.ranks = ranks
        self._clock = clock
        self._sent_at = clock()

    def send(self, order: Order) -> None:
        """Give the other ranks an order. Collective: each of them is in `receive_order`."""
        if self.ranks.size > 1:
            self.ranks.broadcast_bytes(encode(order))
            self._sent_at = self._clock()

    def weights(self, learner: Learner) -> Iterator[tuple[str, Tensor]]:
        """The learner's weights, whole, one after another in order of name; must be iterated to the end.

        The other ranks gather sharded weights with the leader. Otherwise they wait, and get keepalives between two
        tensors.
        """
        sharded = is_sharded(learner.model)
        if sharded:
            self.send(Gather())
        for name, tensor in learner.full_weights():
            yield name, tensor
            if not sharded:
                self.keepalive()

    def sent(self, learner: Learner) -> Iterable[tuple[str, Tensor]]:
        """The tensors that travel to the generators, whole: the weights, or the adapters alone."""
        if learner.adapters is not None and learner.options.send_adapters:
            return learner.sent().items()
        return self.weights(learner)

    def probe(self, learner: Learner, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probs of tokens[1:] under the learner's weights (`forward.probe_log_probs`)."""
        if is_sharded(learner.model):
            self.send(Probe(tokens=tokens))
        return probe_log_probs(learner.model, tokens, learner.options.arithmetic)

    def keepalive(self) -> None:
        """Tell the other ranks that the leader is there, if it is time to. Call it often while something is awaited."""
        if self.ranks.size > 1 and self._clock() - self._sent_at >= KEEPALIVE_S:
            self.send(KeepAlive())


def receive_order(ranks: Ranks) -> Order:
    """Wait for the leader's next order, on another rank. Collective."""
    return decode(ranks.broadcast_bytes(None))


def encode(order: Order) -> bytes:
    match order:
        case Train(step=step, trajectories=trajectories):
            blobs = cut_all(trajectories, map(pack, trajectories), _MOST_BATCH_BYTES)
            plain: dict[str, Any] = {"do": "train", "step": step, "batch": blobs}
        case Gather():
            plain = {"do": "gather"}
        case Probe(tokens=tokens):
            plain = {"do": "probe", "tokens": list(tokens)}
        case Hold(versions=versions):
            plain = {"do": "hold", "versions": list(versions)}
        case Rescore(version=version, most_tokens=most_tokens, wanted=wanted):
            found = [[pack(one.trajectory), one.positions.tolist()] for one in wanted]
            plain = {"do": "rescore", "version": version, "most_tokens": most_tokens, "wanted": found}
        case Save(folder=folder):
            plain = {"do": "save", "folder": str(folder)}
        case KeepAlive():
            plain = {"do": "still"}
        case Finish():
            plain = {"do": "end"}
    packed: bytes = msgpack.packb(plain)
    return packed


def decode(payload: bytes) -> Order:
    """Raises RunFailed for what is no order: the ranks are not of one version."""
    match msgpack.unpackb(payload):
        case {"do": "train", "step": int(step), "batch": list(batch)}:
            return Train(step=step, trajectories=[unpack(blob) for blob in join_all(batch, _MOST_BATCH_BYTES)])
        case {"do": "gather"}:
            return Gather()
        case {"do": "probe", "tokens": list(tokens)}:
            return Probe(tokens=tuple(tokens))
        case {"do": "hold", "versions": list(versions)}:
            return Hold(versions=tuple(versions))
        case {"do": "rescore", "version": int(version), "most_tokens": int(most_tokens), "wanted": list(wanted)}:
            found = [Wanted(trajectory=unpack(blob), positions=np.array(at, np.int64)) for blob, at in wanted]
            return Rescore(version=version, most_tokens=most_tokens, wanted=found)
        case {"do": "save", "folder": str(folder)}:
            return Save(folder=Path(folder))
        case {"do": "still"}:
            return KeepAlive()
        case {"do": "end"}:
            return Finish()
        case _:
            raise RunFailed("the leader says what this rank does not know: do all run the same version of async_rl?")


def wait_metrics(ranks: Ranks, waited_before_s: float) -> Mapping[str, float]:
    """Metrics of how long the ranks waited for each other in the step just taken. Collective.

    waited_before_s: this rank's sum (`Ranks.waited_s`) before the step.
    """
    if ranks.size == 1:
        return {}
    mine = torch.tensor([ranks.waited_s - waited_before_s], dtype=torch.float64)
    waited: list[float] = ranks.gather_rows(mine, [1] * ranks.size).tolist()
    return {
        "ranks/step_skew": max(waited) - min(waited),
        "ranks/wait_max": max(waited),
        "ranks/slowest": float(waited.index(min(waited))),
    }


def weights_hash(weights: Weights, like: str = "") -> str:
    """`blake3:` and 16 bytes in hex, over names, dtypes, shapes and bytes of all tensors in order of name.

    `like`: a hash that it will be compared with; one without the prefix is BLAKE2b's, as it was up to 0.4.0, which
    takes six times as long."""
    old = bool(like) and not like.startswith(HASH_PREFIX)
    digest: Any = blake2b(digest_size=16) if old else blake3()
    for part in _parts(weights):
        digest.update(part)
    return str(digest.hexdigest()) if old else HASH_PREFIX + str(digest.hexdigest(length=16))


def recorded_hash(folder: RunFolder, version: int) -> str:
    """The hash of the weights of `version` that the run wrote down; empty: none."""
    return next(
        (str(row["hash"]) for row in read_rows(folder.weights) if row["version"] == version and "hash" in row), ""
    )


def weights_checksum(weights: Weights) -> str:
    """CRC-32 of the same bytes, short enough to be taken and written down at every step.

    It finds the step at which two trainings part; only the hash proves that they end alike.
    """
    value = 0
    for part in _parts(weights):
        value = crc32(part, value)
    return f"{value:08x}"


def _parts(weights: Weights) -> Iterator[bytes | memoryview]:
    before = ""
    for name, whole in sorted(weights.items()) if isinstance(weights, Mapping) else weights:
        assert before < name, "weights are hashed in order of name"
        before = name
        tensor = whole.detach().cpu().contiguous()
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.view(-1).view(torch.uint8).numpy().data
