"""The leader's words to the other ranks: which collective comes next, and what it needs. With one rank they are
not said.

Who waits for whom: the others wait for the next word, at most for the time-out of their collectives. Whatever the
leader waits for meanwhile (a batch, an evaluation, a disk), it says every few seconds that it is still there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import torch

from async_rl.errors import RunFailed
from async_rl.trainer.forward import probe_log_probs
from async_rl.trainer.sharding import is_sharded
from async_rl.trajectory.codec import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from async_rl.trainer.learner import Learner
    from async_rl.trainer.ranks import Ranks
    from async_rl.trajectory import Trajectory

STILL_S = 3.0
"""between two words of a leader that waits"""


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
class Save:
    """Write this rank's part of a checkpoint."""

    folder: Path
    """where it is being written"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Still:
    """The leader is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Nothing more is asked of those who follow: the run is done, or all go on by themselves."""


Order = Train | Gather | Probe | Save | Still | End


class Team:
    """The leader's side."""

    def __init__(self, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        assert ranks.leads
        self.ranks = ranks
        self._clock = clock
        self._said = clock()

    def say(self, order: Order) -> None:
        """Collective: each other rank is in `hear`."""
        if self.ranks.size > 1:
            self.ranks.broadcast_bytes(encode(order))
            self._said = self._clock()

    def weights(self, learner: Learner) -> Iterator[tuple[str, Tensor]]:
        """Its weights, whole, one after another, in order of name; must be gone through to the end. Sharded ones
        the others gather with the leader; else they wait, and hear between two tensors that it is still there."""
        sharded = is_sharded(learner.model)
        if sharded:
            self.say(Gather())
        for name, tensor in learner.full_weights():
            yield name, tensor
            if not sharded:
                self.still()

    def sent(self, learner: Learner) -> Iterable[tuple[str, Tensor]]:
        """What travels to the generators, whole: its weights, or its adapters alone, which every rank has."""
        if learner.adapters is not None and learner.options.send_adapters:
            return learner.sent().items()
        return self.weights(learner)

    def probe(self, learner: Learner, tokens: tuple[int, ...]) -> tuple[float, ...]:
        """Log-probs of tokens[1:] under the learner's weights (`probe_log_probs`)."""
        if is_sharded(learner.model):
            self.say(Probe(tokens=tokens))
        return probe_log_probs(learner.model, tokens, learner.options.arithmetic)

    def still(self) -> None:
        """Nothing new; call it as often as you like while something is waited for."""
        if self.ranks.size > 1 and self._clock() - self._said >= STILL_S:
            self.say(Still())


def hear(ranks: Ranks) -> Order:
    """The leader's next word, on another rank."""
    return decode(ranks.broadcast_bytes(None))


def encode(order: Order) -> bytes:
    match order:
        case Train(step=step, trajectories=trajectories):
            said: dict[str, Any] = {"do": "train", "step": step, "batch": [bytes(pack(t)) for t in trajectories]}
        case Gather():
            said = {"do": "gather"}
        case Probe(tokens=tokens):
            said = {"do": "probe", "tokens": list(tokens)}
        case Save(folder=folder):
            said = {"do": "save", "folder": str(folder)}
        case Still():
            said = {"do": "still"}
        case End():
            said = {"do": "end"}
    packed: bytes = msgpack.packb(said)
    return packed


def decode(payload: bytes) -> Order:
    """Raises RunFailed for what is no order: the ranks are not of one version."""
    match msgpack.unpackb(payload):
        case {"do": "train", "step": int(step), "batch": list(batch)}:
            return Train(step=step, trajectories=[unpack(blob) for blob in batch])
        case {"do": "gather"}:
            return Gather()
        case {"do": "probe", "tokens": list(tokens)}:
            return Probe(tokens=tuple(tokens))
        case {"do": "save", "folder": str(folder)}:
            return Save(folder=Path(folder))
        case {"do": "still"}:
            return Still()
        case {"do": "end"}:
            return End()
        case _:
            raise RunFailed("the leader says what this rank does not know: do all run the same version of async_rl?")


def wait_metrics(ranks: Ranks, waited_before_s: float) -> Mapping[str, float]:
    """Of a step just taken, on every rank: how long ranks waited for each other in it. `waited_before_s`: this
    rank's sum (`Ranks.waited_s`) before the step. Collective."""
    if ranks.size == 1:
        return {}
    mine = torch.tensor([ranks.waited_s - waited_before_s], dtype=torch.float64)
    waited: list[float] = ranks.gather_rows(mine, [1] * ranks.size).tolist()
    return {
        "ranks/step_skew": max(waited) - min(waited),
        "ranks/wait_max": max(waited),
        "ranks/slowest": float(waited.index(min(waited))),
    }
