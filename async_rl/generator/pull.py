"""How new weights get into an engine: fetched as tensors and loaded, or sent into vLLM's workers by the trainer."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from async_rl.errors import RunFailed, UserError
from async_rl.generator.engine import Engine
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import WeightsError
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer, WireTimeout

if TYPE_CHECKING:
    from torch import Tensor

RETRY_S = 3.0
"""a request to the trainer is repeated when no answer came for so long"""
POLL_S = 0.1
"""longest wait for one message, and pause before asking again for a version that does not exist yet"""


class TransferEnded(Exception):
    """A transfer ended on the way, and may be begun again: what the engine holds is not whole, and it does not
    generate."""


class WeightSource(Protocol):
    """Where a generator gets its weights."""

    async def pull_into(self, engine: Engine, *, first: bool) -> None:
        """Wait for a version newer than the engine's (`first`: for any) and load it into the engine. A source that
        knows of none changes nothing. Raises WeightsError or RunFailed."""
        ...

    def close(self) -> None: ...


class TensorReader(Protocol):
    """Reads whole versions of the weights: from shared memory, or from a stream."""

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """(version, tensors by name): the newest, or one newer than was read last. Raises WeightsError."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class PlaceReader(Protocol):
    """A `TensorReader` that can write a version where it is wanted."""

    def read_into(self, targets: Mapping[str, Tensor]) -> int:
        """Overwrite `targets` with the newest version and return its number. Raises WeightsError, and ValueError with
        nothing changed when names or shapes do not fit."""
        ...


@runtime_checkable
class InPlace(Protocol):
    """An engine whose weights can be overwritten where they are."""

    async def load_in_place(self, read: Callable[[Mapping[str, Tensor]], int]) -> None:
        """`Engine.load` with the version that `read` writes into the engine's tensors. Raises what it raises."""
        ...


@runtime_checkable
class SharedReader(Protocol):
    """A `TensorReader` whose tensors lie in memory that other processes of this host can map."""

    path: Path

    def wait_for_version(self) -> int:
        """The newest version, as soon as there is one. Raises WeightsError."""
        ...

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """Of the tensors, by name."""
        ...


@runtime_checkable
class SharedLoader(Protocol):
    """An engine whose processes read shared memory themselves."""

    async def load_shared(self, reader: SharedReader) -> None:
        """`Engine.load` with the newest version there. Raises what it raises."""
        ...


@runtime_checkable
class Linkable(Protocol):
    """An engine that takes weights from the trainer's calls: vLLM."""

    async def handle_call(self, method: str, version: int, detail: Mapping[str, Any]) -> None:
        """Execute a call of the trainer's side of vLLM: init, start, update or finish. Tokens sampled after finish
        carry `version`. Raises RunFailed, and TransferEnded for a broadcast in which another engine has gone."""
        ...


class ReaderSource:
    """A `WeightSource` whose tensors come to this process, which loads them into the engine."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    async def pull_into(self, engine: Engine, *, first: bool) -> None:
        # Copying a large model must not stop the other coroutines.
        try:
            if isinstance(self._reader, PlaceReader) and isinstance(engine, InPlace):
                await engine.load_in_place(self._reader.read_into)
                return
            if isinstance(self._reader, SharedReader) and isinstance(engine, SharedLoader):
                newest = await asyncio.to_thread(self._reader.wait_for_version)
                if newest > engine.version or first:
                    await engine.load_shared(self._reader)
                return
            version, tensors = await asyncio.to_thread(self._reader.read)
            if version > engine.version or first:
                await engine.load(tensors, version)
        except ValueError as error:  # the same would happen again
            raise UserError(f"model.path: this generator's model is not the one that is trained: {error}") from None

    def close(self) -> None:
        self._reader.close()


class LinkSource:
    """A `WeightSource` whose tensors go from the trainer's GPU straight to vLLM's workers. Only the calls that the
    trainer makes on vLLM pass through this process."""

    def __init__(self, endpoint: str, name: str, *, way: str, workers: int, first_s: float, timeout_s: float) -> None:
        """
        Args:
            endpoint: of the trainer's link server (weights/link.py).
            way: "nccl" or "ipc".
            workers: number of vLLM's worker processes.
            first_s: longest wait for the first weights, while the trainer loads its model; seconds.
            timeout_s: longest time of each later transfer; seconds.
        """
        self._first_s = first_s
        self._name, self._way, self._workers, self._timeout_s = name, way, workers, timeout_s
        self._session = time.time_ns()
        self._dealer = AsyncDealer(endpoint, f"{name}/link {self._session}")  # messages for an earlier life are lost
        self._version = -1
        """of the running transfer; -1: none"""

    async def pull_into(self, engine: Engine, *, first: bool) -> None:
        assert isinstance(engine, Linkable)
        after = -1 if first else engine.version
        limit_s, setting = (self._first_s, "wire.timeout_s") if first else (self._timeout_s, "weights.timeout_s")
        deadline = time.monotonic() + limit_s
        self._version, asked_at = -1, 0.0
        while True:
            now = time.monotonic()
            if now > deadline:
                raise RunFailed(
                    f"{self._name} waited {limit_s:g} s ({setting}) for the trainer to send weights "
                    f"newer than version {after} over {self._way}"
                )
            if now - asked_at > RETRY_S and self._version < 0:
                asked_at = now
                await self._ask(after)
            try:
                message = await self._dealer.receive(POLL_S, "the trainer's next call")
            except WireTimeout:
                continue
            except WireError as error:
                raise RunFailed(f"{self._name} cannot read what the trainer sends: {error}") from None
            match message:
                case msg.LinkCall():
                    if message.method == "start":  # it may have waited until others had theirs
                        deadline = max(deadline, time.monotonic() + self._timeout_s)
                    if await self._handle(engine, message, after, deadline):
                        return
                case msg.Waiting() if self._version < 0:
                    asked_at = now - RETRY_S + POLL_S
                    if not first:
                        return  # the buffer announces the next version
                case msg.Refused(reason=reason):
                    raise RunFailed(f"{self._name} gets no weights over {self._way}: {reason}")

    async def _ask(self, after: int) -> None:
        await self._dealer.send(
            msg.AskLink(
                name=self._name,
                pid=os.getpid(),
                session=self._session,
                way=self._way,
                workers=self._workers,
                after=after,
            )
        )

    async def _handle(self, engine: Linkable, call: msg.LinkCall, after: int, deadline: float) -> bool:
        """Execute one call and answer it. True when it was the last one. Raises RunFailed: what an engine holds whose
        update failed half-way is unknown."""
        try:
            self._check(call, after)
            left = max(0.0, deadline - time.monotonic())
            if call.method == "ready":  # to be here is all that is asked
                await self._answer(call)
                return False
            await asyncio.wait_for(engine.handle_call(call.method, call.version, call.detail), left)
        except TransferEnded as error:
            await self._answer(call, again=str(error))
            return False
        except TimeoutError:
            reason = f"its part of '{call.method}' did not come from the trainer within {self._timeout_s:g} s"
            await self._answer(call, reason)
            raise RunFailed(f"{self._name}, weights version {call.version} over {self._way}: {reason}") from None
        except RunFailed as error:
            await self._answer(call, str(error))
            raise
        await self._answer(call)
        return call.method == "finish"

    def _check(self, call: msg.LinkCall, after: int) -> None:
        """Raises RunFailed for a version other than that of the running transfer, or an old one."""
        if call.method in ("ready", "init"):
            return
        if call.method == "start":
            self._version = call.version
        if call.version != self._version or call.version <= after:
            raise RunFailed(
                f"{self._name}: '{call.method}' is for weights version {call.version}, but the transfer under way is "
                f"of version {self._version}, and this generator holds version {after}"
            )

    async def _answer(self, call: msg.LinkCall, error: str = "", again: str = "") -> None:
        await self._dealer.send(msg.LinkAnswer(session=self._session, number=call.number, error=error, again=again))

    def close(self) -> None:
        self._dealer.close(linger_s=0.5)


class MergingSource:
    """A `TensorReader` that reads adapters and gives whole weights: the base model's with the adapters added.

    This process holds the base in addition to the engine's weights, in the dtype of the model's files. The sum is the
    trainer's, bit for bit (`model.lora.merged`), so the canary compares checksums as with whole weights and detects a
    base that is not the trainer's, and an adapter that is old, damaged or not added.
    """

    def __init__(self, source: TensorReader, base: Mapping[str, Tensor], scaling: float) -> None:
        """`base`: all weights of the model by name, on the device that adds; `scaling`: alpha / rank."""
        self._source = source
        self._base = base
        self._scaling = scaling

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """(version, all weights): float32 where there is an adapter, else the base's own tensor and dtype. Raises
        WeightsError when the adapters do not fit the base."""
        version, adapters = self._source.read()
        return version, with_adapters(self._base, adapters, self._scaling)

    def close(self) -> None:
        self._source.close()


def with_adapters(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """All weights of the model; `base` stays as it is. A weight is [out, in], its adapters A [rank, in] and B
    [out, rank]. Raises WeightsError for an adapter that is incomplete or fits no weight."""
    from async_rl.model.lora import A, B, merged

    weights = dict(base)
    layers = {name.removesuffix(A).removesuffix(B) for name in adapters}
    for layer in layers:
        a, b, weight = adapters.get(layer + A), adapters.get(layer + B), base.get(f"{layer}.weight")
        if a is None or b is None or weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise WeightsError(
                f"the adapter of {layer} does not fit the model here: is model.path the model the run trains?"
            )
        weights[f"{layer}.weight"] = merged(weight, a.to(weight.device), b.to(weight.device), scaling)
    return weights


@dataclass(slots=True)
class EngineWeights:
    """The weights in a generator's engine: which version is announced, pulling it, and evidence of what was loaded."""

    generator: str
    """its name"""
    engine: Engine
    source: WeightSource
    probe: tuple[int, ...] = ()
    """tokens whose log-probs are part of the evidence"""
    announced: int = 0
    """newest version the buffer spoke of"""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """a version has been announced"""
    loaded: bool = False
    """the engine holds weights of the run, not only those of its model folder"""
    loading: bool = False

    def announce(self, version: int) -> None:
        self.announced = max(self.announced, version)
        self.news.set()

    @property
    def behind(self) -> bool:
        return self.announced > self.engine.version

    async def pull(self) -> None:
        """Load newer weights; the first time in any case, because the model folder of another host may hold others
        than the run began with."""
        self.loading = True
        await self.source.pull_into(self.engine, first=not self.loaded)
        self.loaded, self.loading = True, False

    async def evidence(self) -> msg.Canary:
        """Checksums and log-probs of the weights that the engine holds; the trainer knows what they must be."""
        shown = await self.engine.fingerprint()
        log_probs = await self.engine.probe(self.probe)
        return msg.Canary(
            name=self.generator,
            version=self.engine.version,
            digests=tuple([(name, digest) for name, digest in shown.items() if digest is not None]),
            split=tuple([name for name, digest in shown.items() if digest is None]),
            log_probs=tuple([float(value) for value in log_probs]),
        )
