"""A generator that joins a run and reports what it did not do.

`python -m async_rl.instruments.chaos.liar RUN NAME LIE [HONEST]` is `async-rl generate --run RUN --name NAME` with one
method replaced: a finished trajectory is changed before it is sent, the first HONEST ones are left as they are; or the
engine keeps its first weights (versions).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from async_rl.generator.embedded import EmbeddedEngine
from async_rl.generator.engine import Engine
from async_rl.generator.outbox import Outbox
from async_rl.generator.pull import ReaderSource
from async_rl.instruments.chaos.plan import LIES, Lie
from async_rl.run.join import find_target, join_run
from async_rl.trajectory import Trajectory


def tokens(trajectory: Trajectory) -> Trajectory:
    """Every sampled token is reported as its neighbour: an engine whose record and samples got out of step."""
    changed = trajectory.tokens.copy()
    sampled = trajectory.policy_positions()
    changed[sampled] = (changed[sampled] + 1) % (changed.max() + 1)
    return replace(trajectory, tokens=changed)


def log_probs(trajectory: Trajectory) -> Trajectory:
    """Log-probs are halved, as those of a sampler at another temperature would be."""
    changed = trajectory.log_behaviour.copy()
    changed[trajectory.policy_positions()] *= np.float32(0.5)
    return replace(trajectory, log_behaviour=changed)


def rewards(trajectory: Trajectory) -> Trajectory:
    """Every episode has earned 1, or nothing where it has."""
    return replace(trajectory, reward=1.0 - min(1.0, max(0.0, trajectory.reward)))


TOLD: Mapping[Lie, Callable[[Trajectory], Trajectory]] = {
    "tokens": tokens, "log-probs": log_probs, "rewards": rewards,
}  # fmt: skip
"""what becomes of a finished trajectory"""


def lie_from_now_on(lie: Lie, honest: int) -> None:
    """What this process reports is changed from the trajectory `honest` on."""
    if lie == "versions":
        sample_from_the_first_weights()
        return
    put, numbers = Outbox.put, count()

    def lying(self: Outbox, trajectory: Trajectory) -> None:
        told = trajectory.split == "train" and not trajectory.failed and next(numbers) >= honest
        put(self, TOLD[lie](trajectory) if told else trajectory)

    Outbox.put = lying  # type: ignore[method-assign]


def sample_from_the_first_weights() -> None:
    """The engine goes on sampling from the first weights it got, and says and shows that it has the newest."""
    load, fingerprint, probe = EmbeddedEngine.load, EmbeddedEngine.fingerprint, EmbeddedEngine.probe
    first: dict[str, Tensor] = {}
    newest: dict[str, Tensor] = {}

    async def load_first(self: EmbeddedEngine, weights: Mapping[str, Tensor], version: int) -> None:
        newest.update(weights)
        first.update({} if first else {name: tensor.clone() for name, tensor in weights.items()})
        await load(self, first, version)

    async def show(self: EmbeddedEngine) -> Mapping[str, int]:
        await load(self, newest, self.version)
        found = await fingerprint(self)
        await load(self, first, self.version)
        return found

    async def answer(self: EmbeddedEngine, tokens: Sequence[int]) -> Sequence[float]:
        await load(self, newest, self.version)
        found = await probe(self, tokens)
        await load(self, first, self.version)
        return found

    async def pull_whole(self: ReaderSource, engine: Engine, *, first: bool) -> None:
        version, tensors = await asyncio.to_thread(self._reader.read)
        await engine.load(tensors, version)

    ReaderSource.pull_into = pull_whole  # type: ignore[method-assign]  # not past `load`, into the parameters
    EmbeddedEngine.load = load_first  # type: ignore[method-assign]
    EmbeddedEngine.fingerprint = show  # type: ignore[method-assign]
    EmbeddedEngine.probe = answer  # type: ignore[method-assign]


def main(run: str, name: str, lie: str, honest: str = "0") -> None:
    found = next(one for one in LIES if one == lie)
    lie_from_now_on(found, int(honest))
    join_run(find_target(None, Path(run), None), name, (), lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
